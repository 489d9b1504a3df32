"""A variable in memory that the ranks of one node share, cut in blocks with a lock each; the passes are made in C.

What a pass does stands in csrc/include/mpidl_center.h. A rank that dies inside a pass leaves a block locked: a rank
that waits for this lock takes it away if the block is whole, and otherwise raises an error that names the dead rank. No
rank goes on with half a block.
"""

from __future__ import annotations

import copy
import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidl.errors import ClosedError, RankFailedError
from mpidl.mpi import exit_protocol, shared_memory
from mpidl.mpi.processes import Process
from mpidl.mpi.topology import Topology
from mpidl.native import center

_BLOCK = 1 << 17  # bytes: with what is added and what is read, three of them stay in a core's cache
_PATIENCE = 20_000_000  # nanoseconds between two looks at signals and the dead
_SAY_AFTER = 10.0  # seconds


class LockedArray:
    """Equally typed elements, zeros at first, which every rank of a node reads and changes in place.

    Args:
        ranks: all on one node.
        count: elements, on all ranks together.
        dtype: "float32" or "float64".
        name: for messages.
        memory: as `map_blocks` gave it.
    """

    def __init__(self, ranks: Topology, count: int, dtype: str, name: str, memory: Any) -> None:
        self._ranks, self._name, self._memory = ranks, name, memory
        self._dtype = np.dtype(dtype)
        block = _BLOCK // self._dtype.itemsize
        self._center: Any = center.view(memory, count, block, dtype, ranks.rank + 1)
        self._token = exit_protocol.opened(f"the shared memory of {name}")
        self.look: Callable[[], None] = lambda: None  # called while this rank waits; raises if another has died

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    def watched_by(self, look: Callable[[], None]) -> LockedArray:
        """Returns the same array with a `look` of its own; to be dropped before `close`."""
        other = copy.copy(self)
        other.look = look
        return other

    def add(self, start: int, values: Any, scale: float = 1.0, *, before: Any = None, after: Any = None) -> None:
        """Adds `values * scale` to the elements from `start` on, each block in one step with what is copied of it.

        Args:
            start: the first element.
            values: contiguous, of the variable's dtype.
            scale: the products are rounded to that dtype.
            before: receives the elements as they were; None: nothing does.
            after: likewise, as they are then.
        """
        self._pass(start, values.size, values=values, scale=scale, before=before, after=after)

    def replace(self, start: int, values: Any) -> None:
        """Puts `values` in the place of the elements from `start` on."""
        self._pass(start, values.size, values=values, replaces=True)

    def read(self, start: int, out: Any) -> None:
        """Copies the elements from `start` on into `out`."""
        self._pass(start, out.size, after=out)

    def close(self) -> None:
        """Gives the memory back; a collective."""
        if self._center is None:
            return
        self._center = None
        self._ranks.barrier(f"closing the shared memory of {self._name}")
        self._memory = None
        exit_protocol.closed(self._token)

    def _took_away(self, one: Any) -> bool:
        """Takes away the lock that a pass waits for, if its holder has died and the block is whole.

        Raises:
            RankFailedError: the holder died while it changed the block.
        """
        holder = self._process(one)
        if holder is None or holder.alive():
            return False
        if not center.take_away(self._center, one, one.waits_for):
            raise RankFailedError(
                f"rank {one.waits_for - 1} (process {holder.pid}) died while it changed {self._name} around element "
                f"{one.start + one.done}: that part may be changed by half and is not used any more; go on from the "
                "last checkpoint"
            )
        return True

    def _process(self, one: Any) -> Process | None:
        """Returns the process whose lock a pass waits for; None if the lock was free again by then."""
        processes = self._ranks.placement.processes
        return processes[one.waits_for - 1] if 0 < one.waits_for <= len(processes) else None

    def _pass(
        self,
        start: int,
        count: int,
        *,
        values: Any = None,
        scale: float = 1.0,
        replaces: bool = False,
        before: Any = None,
        after: Any = None,
    ) -> None:
        if self._center is None:
            raise ClosedError(f"the shared memory of {self._name} is not open")
        given = [one for one in (values, before, after) if one is not None]
        assert all(one.dtype == self._dtype and one.size == count and one.flags.c_contiguous for one in given)
        first, second, third = (0 if one is None else one.ctypes.data for one in (values, before, after))
        one = center.new_pass(start, count, (first, second, third), scale=scale, replaces=replaces)
        since, done, said = time.monotonic(), -1, False
        while not center.move(self._center, one, _PATIENCE):
            if self._took_away(one):
                continue
            self.look()
            if one.done != done:
                since, done = time.monotonic(), one.done
            elif not said and one.waits_for and time.monotonic() - since > _SAY_AFTER:
                said = True
                holder = self._process(one)
                exit_protocol.say(
                    f"rank {self._ranks.rank} has waited {_SAY_AFTER:g} s for rank {one.waits_for - 1} (process "
                    f"{holder.pid if holder else 0}), which holds a part of {self._name}: is it stopped?"
                )


def map_blocks(ranks: Topology, count: int, dtype: str, *, alone: bool = False) -> Any:
    """Maps the memory of so many elements; a collective. None if the ranks do not see the same /dev/shm.

    Args:
        ranks: on any nodes; those of one node share the memory, unless `alone`.
        count: alike on the ranks of a node.
        dtype: "float32" or "float64".
        alone: whether each rank has memory of its own.

    Raises:
        SharedMemoryError: there is not enough of it; alike on all ranks.
    """
    block = _BLOCK // np.dtype(dtype).itemsize
    nbytes = center.nbytes(count, block, dtype)
    return mmap.mmap(-1, nbytes) if alone or ranks.size == 1 else shared_memory.map_memory(ranks, nbytes)


def possible(ranks: Topology) -> bool:
    """Returns whether these ranks can share a variable: all are on one node."""
    return len(set(ranks.placement.nodes)) == 1
