"""RMA windows: memory of every rank that the others read and add to without its help.

One access epoch, opened for the whole run by `lock_all`; every operation below ends flushed. What lies in a window and
which rank adds what is decided in `parameter_server`. Operations that meet on one element must be of one kind: all
`add` and `add_and_read`, or all `replace`; `read` goes with either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.errors import ClosedError, SharedMemoryError
from mpidl.mpi import datatypes, exit_protocol, runtime
from mpidl.mpi.topology import Topology
from mpidl.one_sided import locked_array
from mpidl.one_sided.locked_array import LockedArray

_PIECE = 1 << 28  # elements per MPI call


@dataclass(frozen=True)
class Plan:
    """What a window will be, or what is used in its place; ranks that only serve are told of it."""

    name: str
    dtype: str
    counts: tuple[int, ...]  # elements on each rank
    shared: int = 0  # elements of all ranks together, if they may share memory in the window's place; else 0
    reached: tuple[
        int, ...
    ] = ()  # elements that each rank reaches itself, if active messages reach the others; else ()
    alone: bool = False  # with `reached`: no two ranks reach the same elements themselves

    def make(self, ranks: Topology) -> Window | LockedArray:
        """Makes what is planned over `ranks`, filled with zeros; a collective."""
        if self.shared:
            memory = locked_array.map_blocks(ranks, self.shared, self.dtype)
            if memory is not None:
                return LockedArray(ranks, self.shared, self.dtype, self.name, memory)
        if self.reached:
            count, memory = max(1, self.reached[ranks.rank]), None
            try:
                memory = locked_array.map_blocks(ranks, count, self.dtype, alone=self.alone)
            except SharedMemoryError as error:  # alike on all ranks
                if ranks.rank == 0:
                    exit_protocol.say(f"{self.name} is kept in an RMA window: {error}")
            if memory is not None:
                return LockedArray(ranks, count, self.dtype, self.name, memory)
        return self.make_window(ranks)

    def make_window(self, ranks: Topology) -> Window:
        """Makes a window over `ranks` and fills it with zeros; a collective."""
        count = self.counts[ranks.rank]
        window = Window(ranks, count, self.dtype, self.name)
        window.fill(np.zeros(count, self.dtype))
        return window


class Window:
    """Equally typed elements on every rank; making one is a collective.

    Args:
        ranks: whose ranks can reach it.
        count: elements on this rank; may differ between ranks, and may be 0.
        dtype: numpy's name of the elements' dtype.
        name: for messages.
    """

    def __init__(self, ranks: Topology, count: int, dtype: str, name: str) -> None:
        self._mpi = runtime.mpi()
        self._ranks = ranks
        self._name = name
        self._type = datatypes.mpi_datatype(self._mpi, dtype)
        itemsize = np.dtype(dtype).itemsize
        info = self._mpi.Info.Create()
        info.Set("accumulate_ops", "same_op_no_op")  # one operation and NO_OP meet on an element: MPI may use atomics
        # One element where none was asked for: not every MPI takes an empty part.
        self._window = self._mpi.Win.Allocate(max(1, count) * itemsize, itemsize, info, ranks.data)
        info.Free()
        self._local = np.frombuffer(self._window.tomemory(), dtype)[:count]
        self._token = exit_protocol.opened(f"the window {name}")
        self._open = False
        self._lent: list[tuple[int, Any]] = []  # target and memory that MPI may still use, until the next flush

    def fill(self, values: np.ndarray[Any, Any]) -> None:
        """Opens the window with `values` in this rank's part; a collective.

        The barrier orders every rank's plain stores before any other rank's first access; afterwards this memory is
        touched by MPI calls only, since plain stores among accumulates lose updates.
        """
        self._local[:] = values
        self._window.Lock_all(self._mpi.MODE_NOCHECK)
        self._window.Sync()
        self._ranks.barrier(f"opening the window {self._name}")
        self._open = True

    def add(self, target: int, offset: int, values: np.ndarray[Any, Any]) -> None:
        """Starts adding `values` to target's elements from `offset` on, atomic per element; ends with `flush`."""
        self._check()
        self._lent.append((target, values))
        for at in range(0, values.size, _PIECE):
            piece = values[at : at + _PIECE]
            place = (offset + at, piece.size, self._type)
            self._window.Accumulate([piece, self._type], target, place, self._mpi.SUM)

    def write(self, target: int, offset: int, values: np.ndarray[Any, Any]) -> None:
        """Starts replacing target's elements from `offset` on, which no rank may use meanwhile; ends with `flush`."""
        self._check()
        self._lent.append((target, values))
        for at in range(0, values.size, _PIECE):
            piece = values[at : at + _PIECE]
            self._window.Put([piece, self._type], target, (offset + at, piece.size, self._type))

    def add_at(self, target: int, indices: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
        """Starts adding `values` to target's elements `indices` (int32, ascending); ends with `flush`."""
        self._check()
        self._lent.append((target, values))
        scattered = self._type.Create_indexed_block(1, indices)
        scattered.Commit()
        self._window.Accumulate([values, values.size, self._type], target, (0, 1, scattered), self._mpi.SUM)
        scattered.Free()  # MPI keeps what the operation under way needs

    def replace(self, target: int, offset: int, values: np.ndarray[Any, Any]) -> None:
        """Starts replacing target's elements from `offset` on, which others may read; ends with `flush`."""
        self._check()
        self._lent.append((target, values))
        for at in range(0, values.size, _PIECE):
            piece = values[at : at + _PIECE]
            place = (offset + at, piece.size, self._type)
            self._window.Accumulate([piece, self._type], target, place, self._mpi.REPLACE)

    def add_and_read(
        self, target: int, offset: int, values: np.ndarray[Any, Any], before: np.ndarray[Any, Any]
    ) -> None:
        """Starts adding `values` and copying what was there before, as one step per element; ends with `flush`."""
        self._check()
        self._lent.append((target, (values, before)))
        for at in range(0, values.size, _PIECE):
            given, found = values[at : at + _PIECE], before[at : at + _PIECE]
            place = (offset + at, given.size, self._type)
            self._window.Get_accumulate([given, self._type], [found, self._type], target, place, self._mpi.SUM)

    def read(self, target: int, offset: int, out: np.ndarray[Any, Any]) -> None:
        """Starts copying target's elements from `offset` on into `out`, atomic per element; ends with `flush`."""
        self._check()
        self._lent.append((target, out))
        for at in range(0, out.size, _PIECE):
            piece = out[at : at + _PIECE]
            place = (offset + at, piece.size, self._type)
            nothing = [None, 0, self._type]
            self._window.Get_accumulate(nothing, [piece, self._type], target, place, self._mpi.NO_OP)

    def fetch_add(self, target: int, offset: int, value: int) -> int:
        """Adds to one element and returns what it held before, as one atomic step; 0 reads it. Flushed."""
        self._check()
        given, found = np.array([value], np.int64), np.empty(1, np.int64)
        operation = self._mpi.SUM if value else self._mpi.NO_OP
        self._window.Fetch_and_op([given, self._type], [found, self._type], target, offset, operation)
        self._window.Flush(target)
        return int(found[0])

    def flush(self, target: int | None = None) -> None:
        """Returns when what was started, towards one rank or all, has taken effect there."""
        self._check()
        if target is None:
            self._window.Flush_all()
        else:
            self._window.Flush(target)
        self._lent = [lent for lent in self._lent if target not in (None, lent[0])]

    def close(self) -> None:
        """Gives the memory back; a collective.

        Flush, unlock, barrier, free, in this order: the barrier keeps every rank's epoch closed before any window goes
        and before the next collective; without it MPICH hangs at the end of asynchronous runs.
        """
        if self._window is None:
            return
        if self._open:
            self._window.Flush_all()
            self._window.Unlock_all()
            self._lent.clear()
            self._open = False
        self._ranks.barrier(f"closing the window {self._name}")
        self._local = np.empty(0)
        window, self._window = self._window, None
        window.Free()
        exit_protocol.closed(self._token)

    def _check(self) -> None:
        if not self._open:
            raise ClosedError(f"the window {self._name} is not open")
