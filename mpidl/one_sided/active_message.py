"""Letters: how a worker reaches a shard in the memory of another node, which a rank of that node changes for it.

A letter is a header, and then piece by piece what is to be added or put there; every piece is answered, by what was
read of the shard or by nothing. Several pieces are under way at a time, in both directions. Here is what who writes
does; who answers is in `message_server`, and what a worker writes for in `parameter_server.center.remote_array`.
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
AHEAD = 3  # pieces of a letter under way at a time: with more, over TCP, Open MPI uses two thirds of a slow link
_YIELDING = 1e-2  # seconds without news after which a waiting worker sleeps between two looks
_PAUSE = 2e-4


def pieces(count: int) -> Iterable[slice]:
    """Cuts so many elements into what travels at a time."""
    return (slice(at, min(at + PIECE, count)) for at in range(0, count, PIECE))


class ActiveMessage:
    """One letter under way; it keeps the memory that it works on.

    Args:
        ranks: whose communicator carries letters.
        to: the rank that answers.
        header: of dtype HEADER, one element.
        values: what is added or put; None for READ.
        out: receives the answers; None for NOTHING.

    Attributes:
        to: see above.
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
        """Moves on; returns whether something came."""
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
        """Whether all that there is to send is on its way."""
        return not self._pieces

    @property
    def answered(self) -> bool:
        """Whether all has been done, and has come."""
        return not self._pieces and not self._under_way and bool(self._sent.Test())


def wait(letters: list[ActiveMessage], meanwhile: Callable[[], bool], look: Callable[[], None]) -> None:
    """Returns when all letters are answered.

    Args:
        letters: all are moved on at once, those to one rank in their order: it takes in one after the other.
        meanwhile: answers what others write; returns whether there was something to do.
        look: raises if a rank has died.
    """
    since = time.monotonic()
    yielding = 0.0 if executor.under_way() else _YIELDING  # beside a thread that computes it leaves the core at once
    while not all(letter.answered for letter in letters):
        news, begun = meanwhile(), set[int]()
        for letter in letters:
            if letter.to not in begun:
                news |= letter.advance()
                if not letter.given:
                    begun.add(letter.to)
        look()
        if news:
            since = time.monotonic()
        elif time.monotonic() - since < yielding:
            os.sched_yield()
        else:
            time.sleep(_PAUSE)
