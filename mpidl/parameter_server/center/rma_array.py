"""The flat array of a center in shards in an RMA window, which ranks of all nodes reach.

`node_array` and `remote_array` hold a center in two other ways, with the same operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidl.one_sided.window import Window
from mpidl.optim.flat import Few, Flat
from mpidl.parameter_server.center.sharding import Shard


class RMAArray:
    """The elements or the sums of a center, in a window; zeros at first."""

    def __init__(self, window: Window, dtype: str, order: Sequence[Shard]) -> None:
        self.window, self.dtype, self._order = window, dtype, order

    def add(self, values: Flat) -> None:
        """Starts adding; ends with `flush`."""
        for part in self._order:
            if part.count:
                self.window.add(part.owner, 0, values[part.start : part.start + part.count])

    def add_and_pull(self, values: Flat, scale: float, out: Flat) -> None:
        """Adds `values * scale`, and copies what then is there into `out`, element by element.

        One message each way: the old elements come, and both sides add to them with the same rounding.
        """
        scaled = values if scale == 1.0 else values * values.dtype.type(scale)
        for part in self._order:
            if part.count:
                here = slice(part.start, part.start + part.count)
                self.window.add_and_read(part.owner, 0, scaled[here], out[here])
        self.window.flush()
        out += scaled

    def add_few(self, few: Few) -> None:
        """Starts adding what is not zero; MPI adds it after what was started before, element by element."""
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
        """Starts giving a shard its values, when no rank uses it; ends with `flush`."""
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
