"""The layout covers every element of every tensor exactly once, in an order and with a name that all ranks share."""

from __future__ import annotations

import math
import random

import pytest

from mpidl.arrays.layout import ITEMSIZE, Bucket, Tensor, buckets, lay_out
from mpidl.errors import ArgumentError


def some_tensors(seed: int) -> list[Tensor]:
    """Up to 30 tensors of up to three dimensions, some without elements, some scalars, of mixed dtypes."""
    source = random.Random(seed)
    shapes = [tuple(source.choice((0, 1, 2, 3, 5, 17)) for _ in range(source.randint(0, 3))) for _ in range(30)]
    dtypes = source.sample(sorted(ITEMSIZE), source.randint(1, 4))
    return [Tensor(f"t{i}", shape, source.choice(dtypes)) for i, shape in enumerate(shapes[: source.randint(0, 30)])]


def assert_covered_once(tensors: list[Tensor], cut: tuple[Bucket, ...]) -> None:
    members = [index for bucket in cut for index in bucket.members]
    assert sorted(members) == list(range(len(tensors)))
    for bucket in cut:
        touched = [0] * bucket.layout.count
        for index, slot in zip(bucket.members, bucket.layout.slots, strict=True):
            tensor = tensors[index]
            assert (slot.name, slot.shape, slot.count) == (tensor.name, tensor.shape, math.prod(tensor.shape))
            assert bucket.layout.dtype == tensor.dtype
            for element in range(slot.offset, slot.offset + slot.count):
                touched[element] += 1
        assert touched == [1] * sum(math.prod(tensors[i].shape) for i in bucket.members)


@pytest.mark.parametrize("cap", [1, 7, 8, 40, 256, 1000, 10**9])
@pytest.mark.parametrize("seed", range(40))
def test_every_element_is_covered_exactly_once(seed: int, cap: int) -> None:
    tensors = some_tensors(seed)
    cut = buckets(tensors, cap)
    assert_covered_once(tensors, cut)
    for bucket in cut:
        nbytes = sum(tensors[i].nbytes for i in bucket.members)
        assert nbytes == bucket.layout.count * ITEMSIZE[bucket.layout.dtype]
        assert nbytes <= cap or sum(tensors[i].nbytes > 0 for i in bucket.members) == 1
        assert list(bucket.members) == sorted(bucket.members, reverse=True)  # as backward delivers gradients


@pytest.mark.parametrize("counts", [(12, 1), (1, 12), (12,), (10,), (11, 0), (5, 5, 1), (3, 12, 3, 12)])
def test_tensors_larger_than_a_bucket_of_10_elements(counts: tuple[int, ...]) -> None:
    tensors = [Tensor(f"t{i}", (count,), "float32") for i, count in enumerate(counts)]
    assert_covered_once(tensors, buckets(tensors, 40))


def test_buckets_are_cut_where_the_next_tensor_would_exceed_them_last_tensor_first() -> None:
    tensors = [Tensor(str(i), (count,), "float32") for i, count in enumerate((4, 12, 1, 5, 5))]
    assert [bucket.members for bucket in buckets(tensors, 40)] == [(4, 3), (2,), (1,), (0,)]


def test_dtypes_do_not_share_a_bucket_and_buckets_come_as_backward_fills_them() -> None:
    dtypes = ("float32", "float64", "float32", "float64", "float32")
    tensors = [Tensor(str(i), (2,), dtype) for i, dtype in enumerate(dtypes)]
    assert [bucket.members for bucket in buckets(tensors, 16)] == [(3,), (4, 2), (1,), (0,)]


def test_no_tensors() -> None:
    assert buckets([], 10) == ()
    assert lay_out([], "float32").count == 0


@pytest.mark.parametrize("cap", [0, -1])
def test_a_bucket_without_room_is_refused(cap: int) -> None:
    with pytest.raises(ArgumentError, match=f"{cap} bytes"):
        buckets([], cap)


def test_lay_out_keeps_the_order_and_leaves_no_gaps() -> None:
    tensors = [Tensor("a", (2, 3), "float16"), Tensor("b", (0, 5), "float16"), Tensor("c", (), "float16")]
    layout = lay_out(tensors, "float32")
    assert [(slot.name, slot.offset, slot.count) for slot in layout.slots] == [("a", 0, 6), ("b", 6, 0), ("c", 6, 1)]
    assert layout.count == 7 and layout.dtype == "float32"


def test_counts_beyond_32_bits() -> None:
    layout = lay_out([Tensor("a", (2**20, 2**12), "float32"), Tensor("b", (3,), "float32")], "float32")
    assert layout.slots[1].offset == 2**32 and layout.count == 2**32 + 3


def test_the_fingerprint_tells_layouts_apart_and_nothing_else() -> None:
    def fingerprint(*tensors: tuple[str, tuple[int, ...]], dtype: str = "float32") -> int:
        return lay_out([Tensor(name, shape, "float32") for name, shape in tensors], dtype).fingerprint()

    base = fingerprint(("a", (2, 3)), ("b", (0,)))
    assert base == fingerprint(("a", (2, 3)), ("b", (0,)))
    others = [
        fingerprint(("a", (2, 3)), ("c", (0,))),
        fingerprint(("a", (3, 2)), ("b", (0,))),
        fingerprint(("a", (6,)), ("b", (0,))),
        fingerprint(("b", (0,)), ("a", (2, 3))),
        fingerprint(("a", (2, 3))),
        fingerprint(("a", (2, 3)), ("b", (0,)), ("", (0,))),
        fingerprint(("a", (2, 3)), ("b", (0,)), dtype="float64"),
        fingerprint(("a", (2, 3)), ("b", (0, 1))),
    ]
    assert len({base, *others}) == len(others) + 1
    assert all(0 <= number < 2**62 for number in (base, *others))  # it travels as an int64 word


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """It is compared between ranks, so it must not hang on Python's seeded hashes; this is its value."""
    assert lay_out([Tensor("weight", (2, 3), "float32")], "float32").fingerprint() == 1150380842801407234


def test_buckets_follow_the_order_of_arrival() -> None:
    tensors = [Tensor(f"t{i}", (2,), "float64" if i == 1 else "float32") for i in range(5)]
    cut = buckets(tensors, 16, [0, 1, 4, 2, 3])
    assert [bucket.members for bucket in cut] == [(1,), (0, 4), (2, 3)]  # a bucket is full at its last member
