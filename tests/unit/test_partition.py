"""Partitions of buckets cover every element once, in parts that begin at whole lines."""

from __future__ import annotations

import pytest

from mpidl.arrays.layout import Tensor, buckets
from mpidl.synchronous.sharded.partition import LINE, partition_bucket

SHAPES = [(3, 5), (64,), (), (0, 4), (1000,), (7, 129), (1,), (65,)]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 32])
@pytest.mark.parametrize("cap", [64, 5000, 2**20])
def test_every_element_has_one_owner(number: int, cap: int) -> None:
    tensors = [Tensor(f"t{i}", shape, "float32") for i, shape in enumerate(SHAPES)]
    seen = set()
    for bucket in buckets(tensors, cap):
        partition = partition_bucket(bucket, number)
        assert partition.count == partition.size * number and partition.size % LINE == 0
        for index, slot in partition.slots.items():
            assert slot.offset % LINE == 0
            seen.add(index)
            parts = [partition.part(index, block) for block in range(number)]
            owned = [part for part in parts if part[0] < part[1]]
            assert [e for start, stop in owned for e in range(start, stop)] == list(range(slot.count))
            assert all(start % LINE == 0 for start, _ in owned)
            for block, (start, stop) in enumerate(parts):
                if start < stop:
                    assert block * partition.size <= slot.offset + start
                    assert slot.offset + stop <= (block + 1) * partition.size
    assert seen == set(range(len(SHAPES)))


@pytest.mark.parametrize("number", [1, 3, 8])
def test_segments_have_no_gaps(number: int) -> None:
    tensors = [Tensor(f"t{i}", shape, "float64") for i, shape in enumerate(SHAPES)]
    for bucket in buckets(tensors, 3000):
        partition = partition_bucket(bucket, number)
        segments, at = partition.segments(), 0
        for count, offset, member in zip(segments.counts, segments.offsets, segments.members, strict=True):
            assert (offset, count > 0) == (at, True)
            if member is not None:
                assert (offset, count) == (partition.slots[member].offset, partition.slots[member].count)
            at += count
        assert at == partition.count


def test_a_bucket_without_elements() -> None:
    (bucket,) = buckets([Tensor("empty", (0,), "float32")], 100)
    partition = partition_bucket(bucket, 4)
    assert (partition.count, partition.segments().counts, partition.part(0, 3)) == (0, (), (0, 0))
