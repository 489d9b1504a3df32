"""Active messages: a rank asks a rank of another node to change or read a part of that node's memory for it.

A message is a header, and then piece by piece the elements to be added or put there; the target answers every piece,
with what it read or with nothing. Several pieces are under way at a time, in both directions. This is the sender's
side; the target's is in `message_server`. `parameter_server.center.remote_array` sends the messages.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mpidl.mpi import executor, runtime
from mpidl.mpi.topology import Topology

ADD, REPLACE, READ = range(3)
NOTHING, BEFORE, AFTER = range(3)  # what is answered
Flat = np.ndarray[Any, Any]

HEADER = np.dtype(
    [("array", "i8"), ("kind", "i8"), ("answer", "i8"), ("start", "i8"), ("count", "i8"), ("scale", "f8")]
)
HEADERS, VALUES, ANSWERS = 11, 12, 13  # tags
PIECE = 1 << 15  # elements
AHEAD = 3  # pieces of a message under way at a time: with more, over TCP, Open MPI uses two thirds of a slow link
_YIELDING = 1e-2  # seconds without news after which a waiting worker sleeps between two looks
_PAUSE = 2e-4


def pieces(count: int) -> Iterable[slice]:
    """Cuts so many elements into what travels at a time."""
    return (slice(at, min(at + PIECE, count)) for at in range(0, count, PIECE))


class ActiveMessage:
    """One message under way; it keeps the memory that it works on.

    Args:
        ranks: their communicator carries active messages and nothing else.
        to: the target, the rank that answers.
        header: of dtype HEADER, one element.
        values: elements that are added or put; None for READ.
        out: receives the answers; None for NOTHING.

    Attributes:
        to: the target.
    """

    def __init__(
        self, ranks: Topology, to: int, header: np.ndarray[Any, Any], values: Flat | None, out: Flat | None
    ) -> None:
        mpi = runtime.mpi()
        self._comm, self.to, self._bytes = ranks.data, to, mpi.BYTE
        self._values, self._out = values, out
        self._pieces = deque(pieces(int(header["count"][0])))
        self._kept = header
        self._sent = self._comm.Isend([header.view(np.uint8), self._bytes], to, HEADERS)
        self._under_way: deque[tuple[Any, Any]] = deque()

    def advance(self) -> bool:
        """Sends and receives what can be without waiting; returns whether an answer came."""
        news = False
        while True:
            while self._pieces and len(self._under_way) < AHEAD:
                self._start(self._pieces.popleft())
            if not self._under_way or not all(request.Test() for request in self._under_way[0]):
                return news
            self._under_way.popleft()
            news = True

    def _start(self, piece: slice) -> None:
        out = np.empty(0, np.uint8) if self._out is None else self._out[piece].view(np.uint8)
        answer = self._comm.Irecv([out, self._bytes], self.to, ANSWERS)
        given = () if self._values is None else (self._values[piece].view(np.uint8),)
        self._under_way.append((answer, *(self._comm.Isend([one, self._bytes], self.to, VALUES) for one in given)))

    @property
    def given(self) -> bool:
        """Whether the sends of all pieces have begun."""
        return not self._pieces

    @property
    def answered(self) -> bool:
        """Whether the target has answered every piece."""
        return not self._pieces and not self._under_way and bool(self._sent.Test())


def wait(messages: list[ActiveMessage], meanwhile: Callable[[], bool], look: Callable[[], None]) -> None:
    """Returns when all messages are answered.

    Args:
        messages: those to different targets advance at once, those to one target in their order, in which it serves
            them.
        meanwhile: answers messages to this rank; returns whether there were any.
        look: raises if a rank has died.
    """
    since = time.monotonic()
    # On the executor's thread: the main thread computes meanwhile, and the core is left to it at once.
    yielding = 0.0 if executor.under_way() else _YIELDING
    while not all(message.answered for message in messages):
        news, busy = meanwhile(), set[int]()
        for message in messages:
            if message.to not in busy:
                news |= message.advance()
                if not message.given:
                    busy.add(message.to)
        look()
        if news:
            since = time.monotonic()
        elif time.monotonic() - since < yielding:
            os.sched_yield()
        else:
            time.sleep(_PAUSE)
