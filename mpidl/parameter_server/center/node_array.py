"""The flat array of a center in memory that the ranks of one node share; its operations are those of `rma_array`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidl.one_sided.locked_array import LockedArray
from mpidl.optim.flat import Few, Flat
from mpidl.parameter_server.center.sharding import Shard, runs


class NodeArray:
    """The elements or the sums of a center; a call has taken effect when it returns, and blocks change whole."""

    def __init__(self, blocks: LockedArray, dtype: str, order: Sequence[Shard]) -> None:
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
