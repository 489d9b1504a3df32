"""The input of a reduction that lies scattered over memory: a gather list, the segments of a packing table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.arrays.view import ArrayView
from mpidl.collectives.tasks import Completed


@dataclass(frozen=True)
class GatherList:
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
        flat = view.as_numpy(out)
        parts = list(zip(self.table.counts, self.table.offsets, self.addresses, strict=True))
        for count, offset, address in parts:
            if not address:
                flat[offset : offset + count] = 0
        there = [part for part in parts if part[2]]
        table = self.table
        if len(there) < len(parts):
            table = Table(tuple(part[0] for part in there), tuple(part[1] for part in there))
        return table.gather([part[2] for part in there], self.dtype, out.address, out.dtype, self.scale).finite


def packed(gather_list: GatherList, out: ArrayView) -> Completed:
    """Packs all segments into flat memory, which is the whole reduction of a rank that is alone; returns that."""
    started = time.perf_counter()
    finite = gather_list.gather(out)
    return Completed(finite=finite, packing=time.perf_counter() - started)


@dataclass(frozen=True)
class Cut:
    """Parts of a table's segments, side by side.

    Attributes:
        table: how they lie in flat order.
        segments: which segment each is part of.
        skipped: elements of that segment before it.
    """

    table: Table
    segments: tuple[int, ...]
    skipped: tuple[int, ...]

    def of(self, whole: GatherList) -> GatherList:
        """Returns these parts of a gather list whose table was cut."""
        item, places = view.ITEMSIZES[whole.dtype], whole.addresses
        parts = zip(self.segments, self.skipped, strict=True)
        addresses = [places[segment] and places[segment] + skipped * item for segment, skipped in parts]
        return GatherList(self.table, addresses, whole.dtype, whole.scale, whole.owner)


def cut(table: Table, length: int, blocks: Sequence[int], start: int, stop: int) -> Cut:
    """Returns elements `start` to `stop` of some of a table's blocks, in their order.

    Args:
        table: sorted and without gaps.
        length: elements of a block.
        blocks: numbers of blocks.
        start: the first element of each block.
        stop: one past the last element of each block.
    """
    begins = np.array(table.offsets, np.int64)
    ends = begins + np.array(table.counts, np.int64)
    counts, segments, skipped = list[int](), list[int](), list[int]()
    for block in blocks:
        low, high = block * length + start, block * length + stop
        for segment in range(np.searchsorted(ends, low, "right"), np.searchsorted(begins, high, "left")):
            begin = max(int(begins[segment]), low)
            count = min(int(ends[segment]), high) - begin
            if count > 0:
                counts.append(count)
                segments.append(segment)
                skipped.append(begin - int(begins[segment]))
    offsets = tuple(int(n) for n in np.cumsum([0, *counts[:-1]])) if counts else ()
    return Cut(Table(tuple(counts), offsets), tuple(segments), tuple(skipped))
