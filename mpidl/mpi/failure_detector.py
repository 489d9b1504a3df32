"""The small messages by which the ranks of a communicator find out who is missing, and what they know of each other.

A `Channel` only ever carries these messages. When a rank looks at them, and what a wait does then, is in `waiting`.
"""

from __future__ import annotations

import struct
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.errors import ClosedError
from mpidl.mpi import exit_protocol, runtime
from mpidl.mpi.processes import Process
from mpidl.native import environment

# Kinds of messages: the sender has left for good; the sender asks who is there; the sender is there; the receiver is to
# tell all that a call is lost; a call is lost; the sender was asked to stop.
LEFT, ASK, HERE, PROPOSE, GIVE_UP, STOP = 1, 2, 3, 4, 5, 6

_TEXT = 496  # bytes
_MESSAGE = struct.Struct(f"<qq{_TEXT}s")
_TAG = 7
_PAUSES = (0.001, 0.05)  # seconds between two looks at who has left: at first, and at most
_GRACE = 30.0  # seconds for the last barrier: a rank killed in it leaves the others waiting
_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_lasting: list[Channel] = []


@dataclass(frozen=True)
class Limits:
    """Seconds that a rank waits for others before it says so, and before it gives up."""

    report: float
    give_up: float


def limits() -> Limits:
    """Returns what the environment asks for; read before MPI does anything, so that a refusal leaves nothing behind.

    Raises:
        ArgumentError: MPIDL_TIMEOUT or MPIDL_STALL_REPORT is not a positive number.
    """
    give_up = environment.TIMEOUT.read()
    return Limits(min(environment.STALL_REPORT.read(), give_up), give_up)


class Channel:
    """The failure detector of one communicator: its messages, and the number of the call in which this rank is."""

    def __init__(self, mpi: Any, comm: Any, name: str, limits: Limits) -> None:
        self._mpi = mpi
        self._comm = comm
        self.name = name
        self._processes: tuple[Process, ...] = ()
        self._sending: list[Any] = []  # requests of messages that may not have gone out yet
        self._sent, self._received = (np.zeros(comm.size, np.int64) for _ in range(2))  # messages, by peer
        self._closing = False
        self._left: dict[int, int] = {}  # rank -> number of the last call that it made
        self._here: dict[int, tuple[int, str]] = {}  # rank -> its answer to the last roll call
        self._lost: tuple[int, str] | None = None  # number of the call that can never complete, and why
        self._kept: list[Any] = []  # requests that MPI still works on and nobody waits for
        self.when_given_up: Callable[[], None] | None = None  # tells those who do not listen here
        self.given_up: str | None = None  # the call of this rank that ended half-way
        self.limits = limits
        self.sequence = 0  # calls begun on this communicator by this rank
        _channels.add(self)

    def know(self, processes: tuple[Process, ...]) -> None:
        """Tells the channel which process each rank is."""
        self._processes = processes

    def last(self) -> None:
        """Keeps the channel until this rank leaves for good, as all its ranks must do."""
        _lasting.append(self)

    def begin(self) -> int:
        """Counts one more call on this communicator and returns its number.

        Raises:
            ClosedError: the communicator was freed, or one of its calls ended half-way: ranks would take the messages
                of one call for another's.
            ForkedError: the process was forked from a rank's.
        """
        runtime.refuse_forked()
        if self._comm is None:
            raise ClosedError(f"{self.name} was freed: it takes no further calls")
        if self.given_up is not None:
            raise ClosedError(f"{self.name} takes no further calls: {self.given_up}")
        self.sequence += 1
        return self.sequence

    def give_up(self, call: str, request: Any) -> None:
        """Ends a call of this rank half-way: no further call can follow, and the rank may not leave quietly.

        Args:
            call: for messages.
            request: what MPI still works on, or its owner; kept with all the memory that belongs to it.
        """
        self._kept.append(request)
        if self.given_up is None:
            self.given_up = f"{call} was given up half-way"
            exit_protocol.opened(self.given_up)
            if self.when_given_up is not None:
                self.when_given_up()

    def leave(self) -> None:
        """Tells all peers that this rank makes no further call."""
        if self._comm is not None and not self._mpi.Is_finalized():
            self._notify(LEFT, self.sequence, "")

    def alone(self) -> bool:
        """Returns whether every peer has left, as far as was taken in, or one is gone without having done so."""
        staying = self._staying()
        return not staying or not all(self._processes[rank].alive() for rank in staying if self._processes)

    def close_together(self) -> Any | None:
        """Returns a request that is complete when every peer has taken in all that this rank ever sent.

        None where not all have left: a peer that is gone without a message would never join in.
        """
        ended = self._comm is None or self._mpi.Is_finalized()
        return None if ended or self._staying() else self._comm.Ibarrier()

    def _staying(self) -> list[int]:
        if self._comm is None or self._mpi.Is_finalized():
            return []
        return [rank for rank in range(self._comm.size) if rank != self._comm.rank and not self.has_left(rank)]

    def ask_to_stop(self, ranks: Iterable[int]) -> None:
        """Passes on to `ranks`, as far as they are there, that this one was asked to stop."""
        for rank in ranks:
            if not self.has_left(rank):
                self._notify(STOP, self.sequence, "", to=rank)

    def close(self) -> np.ndarray[Any, Any]:
        """Ends the sending of messages and returns how many this rank has sent to each peer."""
        self._closing = True
        return self._sent

    def drained(self, expected: np.ndarray[Any, Any]) -> bool:
        """Takes in what has arrived; returns whether all expected messages have, and all of its own are out."""
        self.receive("")
        self._sending = [request for request in self._sending if not request.Test()]
        return not self._sending and bool((self._received == expected).all())

    def free(self) -> None:
        """Frees the communicator under the channel; a collective."""
        _channels.discard(self)
        comm, self._comm = self._comm, None
        comm.Free()

    def _notify(self, kind: int, sequence: int, text: str, to: int | None = None) -> None:
        if self._closing:
            return
        message = _MESSAGE.pack(kind, sequence, text.encode()[:_TEXT])
        targets = [to] if to is not None else [r for r in range(self._comm.size) if r != self._comm.rank]
        self._sending = [request for request in self._sending if not request.Test()]
        self._sending += [self._comm.Isend([message, self._mpi.BYTE], dest=r, tag=_TAG) for r in targets]
        self._sent[targets] += 1

    def receive(self, busy: str) -> None:
        """Takes in what has arrived; `busy` is the call in which this rank waits, on whichever communicator."""
        if self._mpi.Is_finalized():
            return
        status, buffer = self._mpi.Status(), bytearray(_MESSAGE.size)
        while self._comm is not None and self._comm.Iprobe(self._mpi.ANY_SOURCE, _TAG, status):
            source = status.Get_source()
            self._comm.Recv([buffer, self._mpi.BYTE], source=source, tag=_TAG)
            self._received[source] += 1
            kind, sequence, raw = _MESSAGE.unpack(buffer)
            text = raw.rstrip(b"\0").decode(errors="ignore")
            if kind == LEFT:
                self._left[source] = sequence
            elif kind == ASK:
                self._notify(HERE, self.sequence, busy, to=source)
            elif kind == HERE:
                self._here[source] = (sequence, text)
            elif kind == PROPOSE and self._lost is None:
                self.lose(sequence, text)
            elif kind == GIVE_UP:
                self._lost = self._lost or (sequence, text)
            elif kind == STOP:
                exit_protocol.ask_to_stop()

    # What a wait guard asks of its channel.

    def lost(self, sequence: int) -> str | None:
        """Returns why call number `sequence` can never complete: it, or one before it, was given up by somebody."""
        return self._lost[1] if self._lost is not None and self._lost[0] <= sequence else None

    def gone(self, sequence: int) -> list[str]:
        """Returns a phrase for each peer that will never make call number `sequence`."""
        phrases = []
        for rank, process in enumerate(self._processes):
            if self._left.get(rank, sequence) < sequence:
                phrases.append(f"rank {rank} has left: its program ended before this call")
            elif not self.has_left(rank) and not process.alive():
                phrases.append(f"rank {rank} has died: process {process.pid} is gone")
        return phrases

    def has_left(self, rank: int) -> bool:
        """Returns whether a peer ended well: it makes no further call, and nobody had to wait for it."""
        return rank in self._left

    def call_roll(self) -> None:
        self._here.clear()
        self._notify(ASK, self.sequence, "")

    def missing(self, sequence: int) -> list[str]:
        """Returns a phrase for each peer that is not in call number `sequence`, by the last roll call."""
        phrases = []
        for rank in range(self._comm.size):
            reached, text = self._here.get(rank, (-1, ""))
            if rank == self._comm.rank or reached >= sequence:
                continue
            phrases.append(f"rank {rank} waits in {text}" if text else f"rank {rank} is not in any call of mpidl")
        return phrases

    def speaker(self, sequence: int) -> int:
        """Returns the lowest rank that is in call number `sequence`, by the last roll call."""
        mine: int = self._comm.rank
        return min([mine, *(r for r, here in self._here.items() if here[0] >= sequence)])

    def speaks(self, sequence: int) -> bool:
        """Whether this rank is the one that reports for all who wait in call number `sequence`."""
        mine: int = self._comm.rank
        return self.speaker(sequence) == mine

    def propose(self, sequence: int, text: str) -> None:
        """Has the speaker lose the call, so that ranks whose time is over together all raise with one text."""
        if self.speaks(sequence):
            self.lose(sequence, text)
        else:
            self._notify(PROPOSE, sequence, text, to=self.speaker(sequence))

    def lose(self, sequence: int, text: str) -> None:
        """Makes every rank that waits in call `sequence` or a later one, or comes to it, raise with the same text."""
        self._lost = (sequence, text.encode()[:_TEXT].decode(errors="ignore"))
        self._notify(GIVE_UP, sequence, text)


def receive_all(busy: str) -> None:
    """Takes in what has arrived on every channel: this rank's answer is awaited on others than the one it waits on."""
    for channel in list(_channels):
        channel.receive(busy)


def leave_all() -> None:
    """Says goodbye on every channel, and takes in everybody else's: MPI must not end with messages on their way.

    The others may go on for hours without this rank. It waits here rather than in MPI's own end, where no signal gets
    through; if one of them dies it waits no longer.

    All channels are looked at all the time. A goodbye that nobody takes in is more than some networks keep: libfabric's
    tcp holds back all that comes behind some sixty of them. That everybody else's have come does not say that one's
    own have arrived, and MPICH drops, when it ends, what its network has not yet taken: hence the barrier.
    """
    for channel in sorted(_channels, key=lambda one: one in _lasting):  # there last: then all has been said
        channel.leave()
    _look_until(lambda: all(channel.alone() for channel in _lasting))  # of the others some may have let go silently
    requests = [request for channel in _lasting if (request := channel.close_together()) is not None]
    end = time.monotonic() + _GRACE
    _look_until(lambda: all(request.Test() for request in requests) or time.monotonic() > end)


def _look_until(done: Callable[[], bool]) -> None:
    pause = _PAUSES[0]
    receive_all("")
    while not done():
        time.sleep(pause)
        pause = min(1.5 * pause, _PAUSES[1])
        receive_all("")


exit_protocol.before_quiet_leave(leave_all)
