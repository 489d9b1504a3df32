"""The answering of letters (`active_message`), on the rank to which they were written.

It is done by whoever has time: the helper thread, a worker that waits for answers of its own, a dedicated server. Each
piece is one pass over the shard, block by block under their locks, in C.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpidl.mpi import runtime
from mpidl.mpi.executor import ExecutorEndedError
from mpidl.mpi.topology import Topology
from mpidl.one_sided.active_message import (
    AHEAD,
    ANSWERS,
    BEFORE,
    HEADER,
    HEADERS,
    NOTHING,
    READ,
    REPLACE,
    VALUES,
    pieces,
)
from mpidl.one_sided.locked_array import LockedArray


class MessageServer:
    """Answers what the ranks of one server write to this one; making it is a collective, and so is closing it.

    Args:
        ranks: who writes.
        arrays: what letters name by number.
        name: for messages.
        look: called on the main thread while it waits for a lock; raises if a rank has died.

    Attributes:
        ranks: the same ranks, under the communicator that carries letters and nothing else.
        attended: whether a thread serves all the time, so that no other need.
    """

    def __init__(self, ranks: Topology, arrays: Sequence[LockedArray], name: str, look: Callable[[], None]) -> None:
        mpi = runtime.mpi()
        self.ranks = ranks.duplicate(f"the letters of {name}")
        self._comm, self._anyone, self._bytes = self.ranks.data, mpi.ANY_SOURCE, mpi.BYTE
        self._look, self._helped = look, True
        self._arrays = [array.watched_by(self._look_around) for array in arrays]
        self._status = mpi.Status()
        self._lock = threading.Lock()
        self.attended = False
        self._letters: dict[int, deque[_Answering]] = {}  # by who wrote them, in their order
        self._open = True

    def _look_around(self) -> None:
        """A helper thread that waits for a lock looks for nobody: the main thread does, and ends it."""
        if threading.current_thread() is threading.main_thread():
            self._look()
        elif not self._helped:
            raise ExecutorEndedError

    def end_help(self) -> None:
        """Lets no other thread than the main one wait for a lock any more."""
        self._helped = False

    def serve(self) -> bool:
        """Does what can be done without waiting; returns whether there was something. Any thread may call it.

        Raises:
            ExecutorEndedError: it waited for a lock on another thread than the main one.
        """
        channel = self.ranks.channel
        if not self._open or channel.given_up is not None or not self._lock.acquire(blocking=False):
            return False
        try:
            return self._serve()
        except BaseException:
            channel.give_up(f"an answer ({self.ranks.name})", self)
            raise
        finally:
            self._lock.release()

    def _serve(self) -> bool:
        news = False
        # Probed for: over UCX a receive from any source never takes in what came before it (MPICH 5.0.2).
        while message := self._comm.Improbe(self._anyone, HEADERS, self._status):
            writer, header = self._status.Get_source(), np.zeros(1, HEADER)
            message.Recv([header.view(np.uint8), self._bytes])
            array = self._arrays[int(header["array"][0])]
            self._letters.setdefault(writer, deque()).append(_Answering(self._comm, writer, header, array))
            news = True
        for letters in self._letters.values():
            news |= bool(letters) and letters[0].advance()
            if letters and letters[0].answered:
                letters.popleft()
        return news

    def close(self) -> None:
        """Expects no more letters; a collective, when nobody writes any more."""
        if self.ranks.channel.given_up is None:
            while any(self._letters.values()):  # whose writers have their answers
                self._serve()
        self._open = False
        self._letters.clear()
        self._arrays.clear()
        self.ranks.free()


class _Answering:
    """One letter that is being answered."""

    def __init__(self, comm: Any, writer: int, header: np.ndarray[Any, Any], array: LockedArray) -> None:
        self._comm, self._writer, self._array, self._bytes = comm, writer, array, runtime.mpi().BYTE
        self._kind, self._answer, self._start, count = (
            int(header[name][0]) for name in ("kind", "answer", "start", "count")
        )
        self._scale = float(header["scale"][0])
        self._pieces = deque(pieces(count))
        self._arriving: deque[tuple[slice, Any, Any]] = deque()  # place, values, and their request
        self._leaving: deque[tuple[Any, Any]] = deque()  # answers, and their requests

    def advance(self) -> bool:
        news = False
        while True:
            while self._leaving and self._leaving[0][1].Test():
                self._leaving.popleft()
            while self._pieces and len(self._arriving) + len(self._leaving) < AHEAD:
                self._expect(self._pieces.popleft())
            if not self._arriving or not (self._arriving[0][2] is None or self._arriving[0][2].Test()):
                return news
            self._pass(*self._arriving.popleft()[:2])
            news = True

    def _expect(self, piece: slice) -> None:
        values = request = None
        if self._kind != READ:
            values = np.empty(piece.stop - piece.start, self._array.dtype)
            request = self._comm.Irecv([values.view(np.uint8), self._bytes], self._writer, VALUES)
        self._arriving.append((piece, values, request))

    def _pass(self, piece: slice, values: Any) -> None:
        at, count = self._start + piece.start, piece.stop - piece.start
        answer = np.empty(0 if self._answer == NOTHING else count, self._array.dtype)
        if self._kind == READ:
            self._array.read(at, answer)
        elif self._kind == REPLACE:
            self._array.replace(at, values)
        else:
            read = {} if self._answer == NOTHING else {"before" if self._answer == BEFORE else "after": answer}
            self._array.add(at, values, self._scale, **read)
        request = self._comm.Isend([answer.view(np.uint8), self._bytes], self._writer, ANSWERS)
        self._leaving.append((answer, request))

    @property
    def answered(self) -> bool:
        return not self._pieces and not self._arriving and not self._leaving
