"""Parts of a wait that need no MPI: limits from the environment, giving the core away, which process is which."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mpidl.errors import StalledError
from mpidl.mpi.processes import Process, start_time
from mpidl.mpi.waiting import Attention, Backoff, poll


class Slow:
    """A request that completes after some tests."""

    def __init__(self, tests: int) -> None:
        self.left = tests

    def Test(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_poll_waits_to_the_end_or_to_the_limit() -> None:
    request = Slow(1000)
    poll(request, "a test", 60.0, None)
    assert request.left == -1
    owner = ["a communicator that MPI may still write to"]
    kept, began = sys.getrefcount(owner), time.monotonic()
    with pytest.raises(StalledError, match=r"a test has waited 0\.3 s"):
        poll(Slow(10**9), "a test", 0.3, owner)
    assert 0.3 <= time.monotonic() - began < 3
    assert sys.getrefcount(owner) == kept + 1


def test_backoff_spins_first_and_sleeps_later() -> None:
    backoff = Backoff()
    began = time.perf_counter()
    for _ in range(60):
        backoff.pause()
    assert time.perf_counter() - began < 0.01
    busy, began = time.process_time(), time.perf_counter()
    while time.perf_counter() - began < 1.0:
        backoff.pause()
    assert time.process_time() - busy < 0.6


def test_processes_are_told_apart() -> None:
    mine = start_time(os.getpid())
    assert mine is not None
    assert Process(os.getpid(), mine, visible=True).alive()
    assert not Process(os.getpid(), mine - 1, visible=True).alive()  # the number was given to another process
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    assert started is not None
    process = Process(child.pid, started, visible=True)
    assert process.alive()
    child.kill()
    until = time.monotonic() + 10
    while process.alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert not process.alive()  # a zombie by now: nobody has asked for its status
    child.wait()
    child.stdin.close()  # type: ignore[union-attr]
    assert start_time(child.pid) is None
    assert Process(child.pid, started, visible=False).alive()  # on another node: nothing is known


def test_a_look_that_took_long_is_followed_by_more_for_a_while() -> None:
    class Request:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def Test(self, status: str) -> bool:
            if self.seconds:
                time.sleep(self.seconds)
            return status == "done"

    def after(seconds: float) -> bool:
        attention = Attention()
        assert attention.test(Request(seconds), "done")
        assert not attention.test(Request(seconds), "not yet")
        expects = attention.expects_more()
        time.sleep(0.01)
        assert not attention.expects_more()
        return expects

    assert after(0.001)
    assert not all(after(0.0) for _ in range(20))  # all but those in which the core was taken away
