"""What a signal to stop does to a rank of `mpidl train`: the first is noted, its echo ignored, a second one ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from mpidl.mpi import exit_protocol

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the callback noted; the handlers are installed."""
    for name, value in (("_failure", None), ("_on_stop", None), ("_stop_asked", False)):
        monkeypatch.setattr(exit_protocol, name, value)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    calls: list[str] = []
    exit_protocol.on_stop_signal(lambda: calls.append("asked"))
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_is_noted_and_what_follows_within_moments_is_its_echo(
    asked: list[str], first: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    signal.raise_signal(first)
    for number in SIGNALS:
        signal.raise_signal(number)
    assert asked == ["asked"]
    assert exit_protocol._failure is None


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_second_one_ends_the_rank(
    asked: list[str], second: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.raise_signal(signal.SIGUSR1)
    later = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(second)
    assert ended.value.code == status
    assert exit_protocol._failure == second.name  # at exit this rank ends the others
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_forked_child_dies_of_it_as_if_there_were_no_handler(asked: list[str], number: signal.Signals) -> None:
    pid = os.fork()
    if pid == 0:
        signal.raise_signal(number)
        time.sleep(5)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == number
    assert asked == []


def test_a_request_that_another_rank_passes_on_is_noted_and_leaves_a_first_signal_to_come(asked: list[str]) -> None:
    assert not exit_protocol.asked_to_stop()
    exit_protocol.ask_to_stop()
    assert exit_protocol.asked_to_stop()
    signal.raise_signal(signal.SIGTERM)
    assert asked == ["asked", "asked"]
    assert exit_protocol._failure is None


def test_a_program_without_a_use_for_it_ignores_a_request_that_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_protocol, "_stop_asked", False)
    monkeypatch.setattr(exit_protocol, "_on_stop", None)
    exit_protocol.ask_to_stop()
    assert exit_protocol.asked_to_stop()
