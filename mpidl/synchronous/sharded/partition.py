"""The partition of a bucket: equal blocks, one per rank, so that no rank owns more than one part of a tensor.

Tensors begin at multiples of 64 elements, and so do blocks. Every part of a tensor therefore begins at a multiple of 64
elements from the tensor's own start, where vectorised loops begin anew, so that a step on the part computes the same
bits as a step on the whole tensor. This module is arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from mpidl.arrays.layout import ITEMSIZE, Bucket, Slot

LINE = 64  # elements


@dataclass(frozen=True)
class Segments:
    """A bucket's elements without gaps: `members[s]` is the index of the tensor in segment s, None for padding."""

    counts: tuple[int, ...]
    offsets: tuple[int, ...]
    members: tuple[int | None, ...]


@dataclass(frozen=True)
class Partition:
    """A bucket with slots at multiples of `LINE`, as `number` blocks of `size` elements each."""

    bucket: Bucket
    size: int
    number: int

    @property
    def count(self) -> int:
        """Elements in all, padding included."""
        return self.size * self.number

    @property
    def nbytes(self) -> int:
        """Bytes of all elements in the tensors' own dtype."""
        return self.count * ITEMSIZE[self.bucket.layout.dtype]

    @cached_property
    def slots(self) -> dict[int, Slot]:
        """Each tensor's slot, by the tensor's index."""
        return dict(zip(self.bucket.members, self.bucket.layout.slots, strict=True))

    def part(self, index: int, block: int) -> tuple[int, int]:
        """Returns the first element of a tensor that lies in a block and one past the last; two equal numbers: none."""
        slot = self.slots[index]
        start, stop = (min(max(self.size * b - slot.offset, 0), slot.count) for b in (block, block + 1))
        return start, stop

    def segments(self) -> Segments:
        """Returns tensors and padding in flat order, those without elements left out."""
        found, end = list[tuple[int, int, int | None]](), 0
        for index, slot in sorted(self.slots.items(), key=lambda item: item[1].offset):
            if slot.offset > end:
                found.append((slot.offset - end, end, None))
            if slot.count:
                found.append((slot.count, slot.offset, index))
            end = slot.offset + slot.count
        if end < self.count:
            found.append((self.count - end, end, None))
        counts, offsets, members = zip(*found, strict=True) if found else ((), (), ())
        return Segments(counts, offsets, members)


def partition_bucket(bucket: Bucket, number: int) -> Partition:
    """Returns the partition of a bucket into `number` equal blocks, its slots moved to multiples of `LINE`."""
    slots, offset = [], 0
    for slot in bucket.layout.slots:
        slots.append(replace(slot, offset=offset))
        offset += _rounded(slot.count, LINE)
    layout = replace(bucket.layout, slots=tuple(slots))
    size = _rounded(offset, LINE * number) // number
    return Partition(Bucket(layout, bucket.members), size, number)


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit
