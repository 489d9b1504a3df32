"""Polled waits with a time limit.

No wait of mpidl blocks inside MPI: between two tests of a request this code lets signals in, gives the core away, and
now and then looks around: has a peer left, has its process died, does it answer a roll call? The messages of the
ranks about that are in `failure_detector`; collectives, words of agreement and data live elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from mpidl.errors import RankFailedError, StalledError
from mpidl.mpi import exit_protocol
from mpidl.mpi.failure_detector import Channel, receive_all

_LOOK_EVERY = 0.1  # seconds between two looks around
_ROLL_CALL = 1.0  # seconds that a peer has to answer: a waiting rank does within one look
_PHRASES = 8  # missing ranks that a message names
_last_look = 0.0
_given_up: list[Any] = []  # MPI may still write there
_WORKED = 2e-5  # seconds: a test that takes longer has moved data; one that finds nothing takes 1 to 15 us
_MORE = 5e-3  # seconds after such a test in which more is to come


class Backoff:
    """Pauses between two tests of a request: first none, then the core is given away, then short sleeps."""

    def __init__(self) -> None:
        self._turns = 0
        self._since = 0.0

    def pause(self) -> None:
        self._turns += 1
        if self._turns < 64:
            return
        now = time.monotonic()
        if self._turns == 64:
            self._since = now
        if now - self._since < 0.05:
            os.sched_yield()  # with more ranks than cores the rank that is waited for needs this core
        else:
            time.sleep(min(1e-3, (now - self._since) * 2e-3))


class Attention:
    """How soon a rank that lets MPI serve others looks again: most of what it moves comes in many pieces.

    Open MPI takes some 64 KiB from a socket each time: one piece a millisecond, were looks a millisecond apart.
    """

    def __init__(self) -> None:
        self._until = 0.0

    def test(self, request: Any, *status: Any) -> bool:
        """Tests a request, which drives MPI, and notes whether there was work."""
        before = time.perf_counter()
        done = bool(request.Test(*status))
        now = time.perf_counter()
        if now - before > _WORKED:
            self.note()
        return done

    def note(self) -> None:
        """Notes that there was work."""
        self._until = time.perf_counter() + _MORE

    def expects_more(self) -> bool:
        """Returns whether there was work a moment ago."""
        return time.perf_counter() < self._until


def poll(request: Any, what: str, limit: float, owner: Any) -> None:
    """Waits for a request that has no channel to ask on, such as the making of a communicator.

    Args:
        request: an `mpi4py.MPI.Request`.
        what: the call that waits, for messages.
        limit: seconds.
        owner: holds what MPI works on; kept, should the wait be given up.

    Raises:
        StalledError: it did not complete within `limit` seconds.
    """
    backoff, started = Backoff(), time.monotonic()
    try:
        while not request.Test():
            backoff.pause()
            if time.monotonic() - started > limit:
                raise StalledError(f"{what} has waited {limit:g} s for ranks that never made the same call")
    except BaseException:
        _given_up.append(owner)
        raise


class WaitGuard:
    """What one wait does besides testing its request: looks for the dead, calls the roll, gives up in the end.

    Its time begins now.

    Args:
        channel: of the communicator on which the call was made.
        what: the call that waits, for messages, such as "allreduce".
        sequence: the number that `Channel.begin` gave to the call.
    """

    def __init__(self, channel: Channel, what: str, sequence: int) -> None:
        self.call = f"{what} (call {sequence} on {channel.name})"
        self._channel = channel
        self._sequence = sequence
        self._started = time.monotonic()
        self._next_report = channel.limits.report
        self._roll_called = 0.0
        self._suspects: list[str] = []

    def wait(self, request: Any, owner: Any = None) -> None:
        """Returns when `request`, an `mpi4py.MPI.Request` or one of mpidl's own, has completed.

        One that can wait for a moment by itself (`tried`) is woken sooner than one that is only tested.

        Raises:
            StalledError: a rank that the call needs has left, has died, or did not come within MPIDL_TIMEOUT seconds.
        """
        self.until(getattr(request, "tried", request.Test), (request, owner))

    def until(self, done: Callable[[], bool], owner: Any) -> None:
        """Returns when `done()` is true; `owner` holds what MPI works on, should the wait be given up."""
        backoff = Backoff()
        try:
            while not done():
                backoff.pause()
                self.look()
        except BaseException:
            self._channel.give_up(self.call, owner)
            raise

    def look(self) -> None:
        """Looks around if it is time to; called between two tests of a request.

        Raises:
            StalledError: the call can never complete, or its time is over.
        """
        global _last_look
        now = time.monotonic()
        if now - _last_look < _LOOK_EVERY:
            return
        _last_look = now
        receive_all(self.call)
        self._lose_if_gone()
        waited = now - self._started
        if not self._roll_called and waited > self._next_report:
            self._roll_called = now
            self._channel.call_roll()
        elif self._roll_called and now - self._roll_called > _ROLL_CALL:
            self._roll_called = 0.0
            self._report(waited)
        lost = self._channel.lost(self._sequence)
        if lost is not None:
            raise StalledError(lost)

    def _lose_if_gone(self) -> None:
        """A peer counts as gone when two looks agree: its last message may still be on its way to the first."""
        suspects = self._channel.gone(self._sequence)
        if suspects and suspects == self._suspects and self._channel.lost(self._sequence) is None:
            self._channel.lose(self._sequence, f"{self.call} cannot complete: {_listed(suspects)}")
        self._suspects = suspects

    def _report(self, waited: float) -> None:
        limit = self._channel.limits.give_up
        missing = _listed(self._channel.missing(self._sequence)) or "all ranks are in it; the network is slow"
        if waited >= limit:
            self._channel.propose(self._sequence, f"{self.call} cannot complete, after {limit:g} s: {missing}")
        elif self._channel.speaks(self._sequence):
            exit_protocol.say(f"{self.call} has waited {waited:.0f} s: {missing}")
        self._next_report = min(2 * self._next_report, limit)


class Lookout:
    """Looks for the dead on behalf of a rank that waits in no call, but depends on all ranks of a communicator.

    Args:
        channel: of that communicator.
        doing: what this rank does meanwhile, for its own answers to roll calls; "" if it is outside mpidl.
    """

    def __init__(self, channel: Channel, doing: str) -> None:
        self._channel, self._doing = channel, doing
        self._last = 0.0
        self._suspects: list[str] = []

    def look(self, what: str) -> None:
        """Looks around if it is time to; ranks that ended well are not missed.

        Raises:
            RankFailedError: a rank has died; `what` says whom that concerns.
        """
        now = time.monotonic()
        if now - self._last < _LOOK_EVERY:
            return
        self._last = now
        receive_all(self._doing)
        suspects = self._channel.gone(0)  # not those who have left: call number 0 waits for nobody
        if suspects and suspects == self._suspects:  # two looks agree, as in a wait
            raise RankFailedError(f"{what}: {_listed(suspects)}")
        self._suspects = suspects


def _listed(phrases: list[str]) -> str:
    more = f"; and {len(phrases) - _PHRASES} more" if len(phrases) > _PHRASES else ""
    return "; ".join(phrases[:_PHRASES]) + more
