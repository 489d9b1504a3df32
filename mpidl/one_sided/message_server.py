"""The server of active messages, on the rank to which they were sent.

One of three threads answers: the progress thread, the main thread of a worker that itself waits for answers, or the
main thread of a dedicated server. Each piece is one pass over a locked array, block by block under their locks, in C.
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
    """Answers the active messages that ranks send to this one; making it is a collective, and so is closing it.

    Args:
        ranks: the senders.
        arrays: on which messages work; a message names one by its index.
        name: for error messages.
        look: called on the main thread while it waits for a lock; raises if a rank has died.

    Attributes:
        ranks: the same ranks, under a communicator that carries active messages and nothing else.
        attended: whether the main thread serves all the time, so that the progress thread need not.
    """

    def __init__(self, ranks: Topology, arrays: Sequence[LockedArray], name: str, look: Callable[[], None]) -> None:
        mpi = runtime.mpi()
        self.ranks = ranks.duplicate(f"the active messages of {name}")
        self._comm, self._anyone, self._bytes = self.ranks.data, mpi.ANY_SOURCE, mpi.BYTE
        self._look, self._helped = look, True
        self._arrays = [array.watched_by(self._look_around) for array in arrays]
        self._status = mpi.Status()
        self._lock = threading.Lock()
        self.attended = False
        self._queues: dict[int, deque[_Answering]] = {}  # messages by sender, in the order in which they came
        self._open = True

    def _look_around(self) -> None:
        """Looks for dead ranks on the main thread; the progress thread only checks whether it is to end."""
        if threading.current_thread() is threading.main_thread():
            self._look()
        elif not self._helped:
            raise ExecutorEndedError

    def begin_help(self) -> None:
        """Lets another thread than the main one wait for a lock."""
        self._helped = True

    def end_help(self) -> None:
        """Lets no other thread than the main one wait for a lock any more."""
        self._helped = False

    def serve(self) -> bool:
        """Serves what can be served without waiting; returns whether there was something. Any thread may call it.

        Raises:
            ExecutorEndedError: another thread than the main one waited for a lock when `end_help` was called.
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
            sender, header = self._status.Get_source(), np.zeros(1, HEADER)
            message.Recv([header.view(np.uint8), self._bytes])
            array = self._arrays[int(header["array"][0])]
            self._queues.setdefault(sender, deque()).append(_Answering(self._comm, sender, header, array))
            news = True
        for waiting in self._queues.values():
            news |= bool(waiting) and waiting[0].advance()
            if waiting and waiting[0].answered:
                waiting.popleft()
        return news

    def close(self) -> None:
        """Expects no more messages; a collective, called when every rank has its answers."""
        if self.ranks.channel.given_up is None:
            while any(self._queues.values()):  # their last answers are on the way
                self._serve()
        self._open = False
        self._queues.clear()
        self._arrays.clear()
        self.ranks.free()


class _Answering:
    """One message that is being answered."""

    def __init__(self, comm: Any, sender: int, header: np.ndarray[Any, Any], array: LockedArray) -> None:
        self._comm, self._sender, self._array, self._bytes = comm, sender, array, runtime.mpi().BYTE
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
            request = self._comm.Irecv([values.view(np.uint8), self._bytes], self._sender, VALUES)
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
        request = self._comm.Isend([answer.view(np.uint8), self._bytes], self._sender, ANSWERS)
        self._leaving.append((answer, request))

    @property
    def answered(self) -> bool:
        return not self._pieces and not self._arriving and not self._leaving
