"""What a reduction reads when its input lies scattered over memory: the segments of a packing table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpidl import arrays
from mpidl.arrays import ArrayView
from mpidl.packing import Table


@dataclass(frozen=True)
class Source:
    """Segments, each scaled and cast as it is read.

    Attributes:
        table: how they lie in flat order, sorted and without gaps.
        addresses: of the segments; 0 for one that is read as zeros.
        dtype: of the segments.
        scale: of each element.
        owner: keeps the segments alive.
    """

    table: Table
    addresses: Sequence[int]
    dtype: str
    scale: float
    owner: Any

    def gather(self, out: ArrayView) -> bool:
        """Packs all segments into flat memory; returns whether all is finite, after scale and cast."""
        flat = arrays.as_numpy(out)
        parts = list(zip(self.table.counts, self.table.offsets, self.addresses, strict=True))
        for count, offset, address in parts:
            if not address:
                flat[offset : offset + count] = 0
        there = [part for part in parts if part[2]]
        table = self.table
        if len(there) < len(parts):
            table = Table(tuple(part[0] for part in there), tuple(part[1] for part in there))
        return table.gather([part[2] for part in there], self.dtype, out.address, out.dtype, self.scale).finite
