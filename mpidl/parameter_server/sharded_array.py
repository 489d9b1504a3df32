"""A flat array that lies in shards on several ranks, in an RMA window; its operations are those of the window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidl.flat import Flat
from mpidl.parameter_server.sharding import Shard
from mpidl.topology import Topology
from mpidl.window import Plan


class ShardedArray:
    """The center variable, or what a server keeps beside it; zeros at first. Making it is a collective.

    Args:
        ranks: who can reach it.
        plan: as `plan_of` gives it.
        order: the shards, in the order in which this rank goes through them.
    """

    def __init__(self, ranks: Topology, plan: Plan, order: Sequence[Shard]) -> None:
        self.window = plan.make(ranks)
        self._order = order
        self.dtype = plan.dtype

    def add(self, values: Flat) -> None:
        """Starts adding; ends with `flush`."""
        for part in self._order:
            if part.count:
                self.window.add(part.owner, 0, values[part.start : part.start + part.count])

    def add_few(self, values: Flat) -> None:
        """Starts adding what is not zero; MPI keeps it behind what was started before, element by element."""
        for part in self._order:
            few = values[part.start : part.start + part.count]
            indices = np.flatnonzero(few).astype(np.int32)
            if indices.size:
                self.window.add_at(part.owner, indices, few[indices])

    def add_and_read(self, values: Flat) -> Flat:
        """Adds; returns what was there before, element by element: concurrent calls form one order for each."""
        before = np.empty_like(values)
        for part in self._order:
            if part.count:
                here = slice(part.start, part.start + part.count)
                self.window.add_and_read(part.owner, 0, values[here], before[here])
        self.window.flush()
        return before

    def read(self, out: Flat) -> None:
        """Copies the array into `out`."""
        for part in self._order:
            if part.count:
                self.window.read(part.owner, 0, out[part.start : part.start + part.count])
        self.window.flush()

    def flush(self) -> None:
        """Returns when what was started has taken effect."""
        self.window.flush()

    def close(self) -> None:
        """Gives the memory back; a collective."""
        self.window.close()


def plan_of(name: str, dtype: str, shards: Sequence[Shard], size: int) -> Plan:
    """Returns what a sharded array needs of `size` ranks."""
    counts = dict.fromkeys(range(size), 0) | {part.owner: part.count for part in shards}
    return Plan(name, dtype, tuple(counts.values()))
