"""The flat array of a server, in two of the ways in which it can be held: in shards in an RMA window, which ranks of
all nodes reach, or in memory that the ranks of one node share. `mailed_array` is the third. They do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpidl.flat import Few, Flat
from mpidl.parameter_server.mailed_array import MailedArray
from mpidl.parameter_server.protocols import MAIL, NODE
from mpidl.parameter_server.sharding import Shard, runs
from mpidl.shared_blocks import SharedBlocks
from mpidl.topology import Topology
from mpidl.window import Plan, Window


def make(
    ranks: Topology,
    plan: Plan,
    order: Sequence[Shard],
    look: Callable[[], None],
    *,
    hosts: Sequence[int],
) -> ShardedArray | SharedArray | MailedArray:
    """Makes what a plan says; a collective.

    Args:
        ranks: who can reach it.
        plan: as `plan_of` gives it.
        order: the shards, in the order in which this rank goes through them.
        look: called while this rank waits for others; raises if one has died.
        hosts: by rank, as `protocols.hosts_of` gives it.
    """
    made = plan.make(ranks)
    if isinstance(made, Window):
        return ShardedArray(made, plan.dtype, order)
    made.look = look
    if plan.mailed:
        places, filled = {}, dict.fromkeys(hosts, 0)
        for owner, count in enumerate(plan.counts):
            places[owner] = filled[hosts[owner]]
            filled[hosts[owner]] += count
        here = frozenset(rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank])
        return MailedArray(made, places=places, order=order, here=here, look=look)
    return SharedArray(made, plan.dtype, order)


class ShardedArray:
    """The center variable, or what a server keeps beside it, in a window; zeros at first."""

    def __init__(self, window: Window, dtype: str, order: Sequence[Shard]) -> None:
        self.window, self.dtype, self._order = window, dtype, order

    def add(self, values: Flat) -> None:
        """Starts adding; ends with `flush`."""
        for part in self._order:
            if part.count:
                self.window.add(part.owner, 0, values[part.start : part.start + part.count])

    def add_and_pull(self, values: Flat, scale: float, out: Flat) -> None:
        """Adds `values * scale`, and copies what then is there into `out`, element by element.

        One way there and back: what was there comes, and both sides add to it with the same rounding.
        """
        scaled = values if scale == 1.0 else values * values.dtype.type(scale)
        for part in self._order:
            if part.count:
                here = slice(part.start, part.start + part.count)
                self.window.add_and_read(part.owner, 0, scaled[here], out[here])
        self.window.flush()
        out += scaled

    def add_few(self, few: Few) -> None:
        """Starts adding what is not zero; MPI keeps it behind what was started before, element by element."""
        for part in self._order:
            first, last = np.searchsorted(few.at, (part.start, part.start + part.count))
            if first < last:
                indices = few.at[first:last]
                self.window.add_at(part.owner, (indices - part.start).astype(np.int32), few.values[indices])

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

    def write(self, part: Shard, values: Flat) -> None:
        """Starts giving a shard its values, when nobody uses it; ends with `flush`."""
        self.window.write(part.owner, 0, values)

    def read_shard(self, part: Shard, out: Flat) -> None:
        """Copies a shard into `out`."""
        self.window.read(part.owner, 0, out)
        self.window.flush(part.owner)

    def replace(self, part: Shard, values: Flat) -> None:
        """Gives a shard its values while others may read it; has taken effect on return."""
        self.window.replace(part.owner, 0, values)
        self.window.flush(part.owner)

    def flush(self) -> None:
        """Returns when what was started has taken effect."""
        self.window.flush()

    def close(self) -> None:
        """Gives the memory back; a collective."""
        self.window.close()


class SharedArray:
    """The same in shared memory: all has taken effect when a call returns, and no block of it is seen half-changed."""

    def __init__(self, blocks: SharedBlocks, dtype: str, order: Sequence[Shard]) -> None:
        self._blocks, self.dtype = blocks, dtype
        self._parts = [part for part in order if part.count]

    def add(self, values: Flat) -> None:
        for part in self._parts:
            self._blocks.add(part.start, values[_place(part)])

    def add_and_pull(self, values: Flat, scale: float, out: Flat) -> None:
        """Adds `values * scale`, and copies the array, as it is then, into `out`."""
        for part in self._parts:
            self._blocks.add(part.start, values[_place(part)], scale, after=out[_place(part)])

    def add_few(self, few: Few) -> None:
        for start, stop in runs(few.at):
            self._blocks.add(start, few.values[start:stop])

    def add_and_read(self, values: Flat) -> Flat:
        before = np.empty_like(values)
        for part in self._parts:
            self._blocks.add(part.start, values[_place(part)], before=before[_place(part)])
        return before

    def read(self, out: Flat) -> None:
        for part in self._parts:
            self._blocks.read(part.start, out[_place(part)])

    def write(self, part: Shard, values: Flat) -> None:
        self._blocks.replace(part.start, values)

    def read_shard(self, part: Shard, out: Flat) -> None:
        self._blocks.read(part.start, out)

    def replace(self, part: Shard, values: Flat) -> None:
        self._blocks.replace(part.start, values)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._blocks.close()


def _place(part: Shard) -> slice:
    return slice(part.start, part.start + part.count)


def plan_of(name: str, dtype: str, shards: Sequence[Shard], protocol: str, hosts: Sequence[int]) -> Plan:
    """Returns what such an array needs of the ranks that `hosts` has; see `protocols` for both."""
    found = dict.fromkeys(range(len(hosts)), 0) | {part.owner: part.count for part in shards}
    counts = tuple(found.values())
    if protocol != MAIL:
        return Plan(name, dtype, counts, sum(counts) if protocol == NODE else 0)
    held = dict.fromkeys(hosts, 0)
    for host, count in zip(hosts, counts, strict=True):
        held[host] += count
    reached = tuple(max(1, held[host]) for host in hosts)
    return Plan(name, dtype, counts, mailed=reached, alone=len(held) == len(hosts))
