"""Waits look around: who is late is named while the others still wait, and a rank that waits elsewhere answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mpidl
from mpidl.mpi import waiting

WITH_OTHERS = True
SIZES = (4,)  # each test waits for seconds


@pytest.fixture
def impatient(comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[mpidl.Communicator]:
    """A copy of `comm` that reports a stall after 0.5 s, and gives those who wait time to answer on a busy machine."""
    monkeypatch.setenv("MPIDL_STALL_REPORT", "0.5")
    monkeypatch.setattr(waiting, "_ROLL_CALL", 3.0)
    copy = mpidl.Communicator(comm.topology.data)
    comm.barrier()
    yield copy
    comm.barrier()
    copy.free()


def test_a_late_rank_is_named_once_by_the_lowest_who_waits(
    comm: mpidl.Communicator, impatient: mpidl.Communicator, capfd: pytest.CaptureFixture[str]
) -> None:
    late = comm.size - 1
    if comm.rank == late:
        time.sleep(5.0)
    impatient.barrier()
    said = [line for line in capfd.readouterr().err.splitlines() if "has waited" in line]
    if comm.rank == 0:
        # A second line may come while the late rank is just arriving, and then says something else.
        assert said
        assert f"rank {late} is not in any call of mpidl" in said[0]
        assert "barrier (call" in said[0]
        assert not any(f"rank {r} " in line for line in said for r in range(1, late))
    else:
        assert not said


def test_a_rank_that_waits_elsewhere_says_where(
    comm: mpidl.Communicator, impatient: mpidl.Communicator, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when it only tests again and again."""
    if comm.rank == 1:
        request = comm.iallreduce(np.ones(1))
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            assert not request.test()
            time.sleep(0.01)
        impatient.barrier()
    else:
        impatient.barrier()
        request = comm.iallreduce(np.ones(1))
    assert request.wait() == comm.size
    said = [line for line in capfd.readouterr().err.splitlines() if "has waited" in line]
    if comm.rank == 0:
        assert "rank 1 waits in iallreduce (call" in said[0]


def test_signals_and_threads_run_during_a_wait(comm: mpidl.Communicator) -> None:
    """A wait in C would hold back both."""
    ticks: list[float] = []
    timer = threading.Timer(0.2, lambda: ticks.append(time.monotonic()))
    timer.start()
    if comm.rank == 0:
        time.sleep(1.0)
    began = time.monotonic()
    comm.barrier()
    if comm.rank:
        timer.join()
        assert ticks[0] - began < 0.9
    timer.join()


def test_a_wait_gives_the_core_away(comm: mpidl.Communicator) -> None:
    if comm.rank == 0:
        time.sleep(1.5)
    before = time.process_time()
    comm.barrier()
    assert time.process_time() - before < 0.9


@pytest.mark.parametrize("name", ["MPIDL_TIMEOUT", "MPIDL_STALL_REPORT"])
def test_limits_that_make_no_sense_are_refused_before_mpi_does_anything(
    comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Open MPI wrote the handle of a duplicate still under way into memory that Python had given back."""
    for text in ("0", "-3", "soon", "nan"):
        monkeypatch.setenv(name, text)
        with pytest.raises(mpidl.ArgumentError, match=name):
            mpidl.Communicator(comm.topology.data)
