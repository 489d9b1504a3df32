"""pack and unpack against torch's casts, bit for bit, and against the numpy reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from packing_reference import reference_pack, reference_unpack

import mpidl
from mpidl.errors import ArgumentError, DtypeError

HALVES = [torch.float16, torch.bfloat16]
PAIRS = [(torch.float32, half) for half in HALVES] + [(half, torch.float32) for half in HALVES]
SAME = [(dtype, dtype) for dtype in (torch.float32, torch.float64, *HALVES)]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(ours: torch.Tensor, torchs: torch.Tensor) -> None:
    """Equal bits, except that where torch has a NaN any quiet NaN will do."""
    nan = torchs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(bits(ours)[~nan], bits(torchs)[~nan])
    quiet = {torch.float16: 0x200, torch.bfloat16: 0x40, torch.float32: 0x400000}[ours.dtype]
    assert bool((bits(ours)[nan] & quiet).ne(0).all())


def all_halves(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def hard_floats() -> torch.Tensor:
    """Random bit patterns; every half value, the ties above it and their neighbours; the edges of float32."""
    generator = torch.Generator().manual_seed(20)
    patterns = torch.randint(-(2**31), 2**31, (300_000,), generator=generator)
    near = torch.cat([bits(all_halves(half).float()) for half in HALVES]).to(torch.int64)
    ties = torch.cat([near + step + nudge for step in (0, 0x1000, 0x8000) for nudge in (-1, 0, 1)])
    edges = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF])
    small = torch.arange(0x33000000 - 64, 0x33000000 + 64)  # around float16's smallest subnormal over two
    every = torch.cat([patterns, ties, edges, edges - 2**31, small])
    wrapped = (every + 2**31) % 2**32 - 2**31
    return wrapped.to(torch.int32).view(torch.float32)


def flat_like(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dtype=dtype)


@pytest.mark.parametrize("move", ["pack", "unpack"])
@pytest.mark.parametrize("half", HALVES)
def test_every_half_value_widens_as_in_torch(half: torch.dtype, move: str) -> None:
    values = all_halves(half)
    wide = flat_like(values.numel(), torch.float32)
    written = mpidl.pack([values], wide) if move == "pack" else mpidl.unpack(values, [wide])
    assert_same_bits(wide, values.float())
    assert (written.count, written.finite) == (65536, False)


@pytest.mark.parametrize("move", ["pack", "unpack"])
@pytest.mark.parametrize("half", HALVES)
def test_hard_floats_narrow_as_in_torch(half: torch.dtype, move: str) -> None:
    values = hard_floats()
    narrow = flat_like(values.numel(), half)
    written = mpidl.pack([values], narrow) if move == "pack" else mpidl.unpack(values, [narrow])
    assert_same_bits(narrow, values.to(half))
    assert written.finite is False


@pytest.mark.parametrize("scale", [0.5, 1 / 3, -1.0, 0.0, 65536.0, 1e-30])
@pytest.mark.parametrize("half", HALVES)
def test_scaled_halves_are_rounded_once_from_float32(half: torch.dtype, scale: float) -> None:
    values = all_halves(half)
    out = flat_like(values.numel(), half)
    mpidl.pack([values], out, scale=scale)
    assert_same_bits(out, (values.float() * torch.tensor(scale, dtype=torch.float32)).to(half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_at_scale_one_the_bytes_are_copied(dtype: torch.dtype) -> None:
    values = hard_floats()[: 2 * 10**5].view(dtype)
    assert bool(values.isnan().any())  # signalling ones among them
    out = flat_like(values.numel(), dtype)
    mpidl.pack([values], out)
    assert torch.equal(bits(out), bits(values))


@pytest.mark.parametrize("half", HALVES)
def test_flushing_subnormals_in_torch_changes_no_cast(half: torch.dtype) -> None:
    values = hard_floats()
    expected, wide = values.to(half), all_halves(half).float()
    narrow, back = flat_like(values.numel(), half), flat_like(65536, torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        mpidl.pack([values], narrow)
        mpidl.pack([all_halves(half)], back)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(narrow, expected)
    assert_same_bits(back, wide)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize(("source", "out"), PAIRS + SAME)
@pytest.mark.parametrize("sizes", [(), (0,), (1,), (15, 16, 17), (0, 511, 512, 513, 0), (3, 2000, 1)])
def test_pack_and_unpack_agree_with_the_reference(
    source: torch.dtype, out: torch.dtype, sizes: tuple[int, ...], scale: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=generator).to(source) for size in sizes]
    total = sum(sizes)
    ours, theirs = (torch.full((total + 3,), 9.0, dtype=out) for _ in range(2))
    written, expected = mpidl.pack(tensors, ours, scale=scale), reference_pack(tensors, theirs, scale=scale)
    assert torch.equal(ours, theirs)
    assert (written.count, written.finite) == (total, True)
    assert written.sum_of_squares == pytest.approx(expected.sum_of_squares, rel=1e-13)
    back, again = ([torch.zeros_like(tensor) for tensor in tensors] for _ in range(2))
    written, expected = mpidl.unpack(ours, back, scale=scale), reference_unpack(theirs, again, scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(back, again, strict=True))
    assert written.sum_of_squares == pytest.approx(expected.sum_of_squares, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool])
def test_integers_round_trip(dtype: torch.dtype) -> None:
    tensors = [torch.arange(-50, 50).to(dtype).reshape(10, 10), torch.arange(7).to(dtype)]
    out = torch.zeros(107, dtype=dtype)
    squares = sum(float((tensor.to(torch.float64) ** 2).sum()) for tensor in tensors)
    assert mpidl.pack(tensors, out) == (107, squares, True)
    back = [torch.zeros_like(tensor) for tensor in tensors]
    mpidl.unpack(out, back)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_the_flag_and_the_sum_are_of_what_was_written() -> None:
    values, out = torch.tensor([70000.0, 1.0]), torch.zeros(2, dtype=torch.float16)
    assert mpidl.pack([values], torch.zeros(2)).finite
    assert mpidl.pack([values], out) == (2, float("inf"), False)  # float16 ends at 65504
    assert mpidl.pack([values], out, scale=0.5) == (2, 35008.0**2 + 0.25, True)
    assert mpidl.pack([torch.tensor([float("nan")])], torch.zeros(1)).finite is False


def test_kinds_mix_and_parameters_need_no_detaching() -> None:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    out = np.zeros(7, np.float32)
    mpidl.pack([parameter, np.arange(3, dtype=np.float32)], out)
    np.testing.assert_array_equal(out, [0, 1, 2, 3, 0, 1, 2])
    mpidl.unpack(out, (parameter,), scale=2.0)
    assert parameter.tolist() == [0, 2, 4, 6]


def test_strided_tensors_travel_in_logical_order() -> None:
    image = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    column = np.arange(12, dtype=np.float32).reshape(4, 3)[:, 1]
    out = torch.zeros(28)
    mpidl.pack([image, column], out)
    assert out.tolist() == [*range(24), 1, 4, 7, 10]
    other, strided = torch.zeros_like(image), np.zeros((4, 3), np.float32)[:, 1]
    mpidl.unpack(out, [other, strided])
    assert torch.equal(other, image)
    np.testing.assert_array_equal(strided, column)


def test_unpacking_into_a_saved_tensor_makes_backward_raise() -> None:
    weight = torch.ones(3, requires_grad=True)
    saved = weight * 2
    loss = (saved * saved).sum()
    mpidl.unpack(torch.zeros(3), [saved])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_of_many_tensors_each_is_marked_as_written() -> None:
    written = [torch.ones(3), torch.nn.Parameter(torch.ones(2)), torch.ones(0), torch.ones(2, 3).t()]
    with torch.inference_mode():
        uncounted = torch.ones(1)
    before = [tensor._version for tensor in written]
    mpidl.unpack(torch.zeros(12), [*written, uncounted])
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))
    mpidl.unpack(torch.zeros(6), [*written[:3], uncounted])  # all of them plain
    assert all(tensor._version > version + 1 for tensor, version in zip(written[:3], before, strict=False))


ODD = {
    "strided": lambda values: torch.stack([values, values], 1)[:, 0],
    "expanded": lambda values: values[:1].expand(4),
    "a subclass": torch.nn.Buffer,
    "a parameter": torch.nn.Parameter,
    "numpy": lambda values: values.numpy(),
}


@pytest.mark.parametrize("made", ODD.values(), ids=ODD)
def test_one_tensor_of_another_kind_among_plain_ones(made: Callable[[torch.Tensor], Any]) -> None:
    plain, odd = torch.arange(3.0), made(torch.arange(5.0, 9.0))
    out = torch.zeros(10)
    mpidl.pack([plain, odd, plain], out)
    assert out.tolist() == [0, 1, 2, *odd.tolist(), 0, 1, 2]


def test_neighbours_and_empty_tensors_do_not_overlap() -> None:
    memory = np.arange(10.0)  # in torch an empty tensor has no address
    mpidl.unpack(memory[3:6], [memory[:2], memory[4:][:0], memory[1:][:0], memory[2:3]])
    assert memory.tolist() == [3, 4, 5, *range(3, 10)]
    mpidl.pack([memory[2:4], memory[8:]], memory[4:8])
    assert memory.tolist() == [3, 4, 5, 3, 5, 3, 8, 9, 8, 9]


def frozen() -> np.ndarray[Any, Any]:
    x = np.zeros(4)
    x.flags.writeable = False
    return x


SHARED = torch.zeros(20, dtype=torch.float64)
ONES = torch.ones(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mpidl.pack(ONES, SHARED), DtypeError, "tensors must be a sequence"),
        (lambda: mpidl.pack(3, SHARED), DtypeError, "tensors must be a sequence"),
        (lambda: mpidl.pack([ONES, [1.0]], SHARED), DtypeError, r"tensors\[1\]"),
        (lambda: mpidl.pack([ONES, ONES.float()], SHARED), DtypeError, r"tensors\[1\] holds float32"),
        (lambda: mpidl.pack([ONES.to(torch.complex64)], SHARED), DtypeError, r"tensors\[0\] holds complex64"),
        (lambda: mpidl.pack([ONES, torch._neg_view(ONES)], SHARED), DtypeError, r"tensors\[1\] is a lazy view"),
        (lambda: mpidl.pack([ONES, ONES.to_sparse()], SHARED), DtypeError, r"tensors\[1\] is a sparse or nested"),
        (lambda: mpidl.pack([ONES, ONES.to("meta")], SHARED), DtypeError, r"tensors\[1\] is on device meta"),
        (lambda: mpidl.pack([ONES, ONES, SHARED[3:6]], SHARED), ArgumentError, r"tensors\[2\] overlaps out"),
        (lambda: mpidl.pack([ONES], [0.0] * 4), DtypeError, "out must be"),
        (lambda: mpidl.pack([ONES], SHARED.float()), DtypeError, "float64 cannot be packed as float32"),
        (
            lambda: mpidl.pack([ONES.half()], SHARED.bfloat16()),
            DtypeError,
            "float16 cannot be packed as bfloat16",
        ),
        (lambda: mpidl.pack([ONES], torch.zeros(3).double()), ArgumentError, "out has 3 elements, .* have 4"),
        (lambda: mpidl.pack([ONES], torch.zeros(2, 2).double()), ArgumentError, "out must be 1-D"),
        (lambda: mpidl.pack([ONES], SHARED[::2]), ArgumentError, "out must be 1-D and contiguous"),
        (lambda: mpidl.pack([ONES], frozen()), ArgumentError, "out is read-only"),
        (lambda: mpidl.pack([SHARED[3:6]], SHARED), ArgumentError, r"tensors\[0\] overlaps out"),
        (lambda: mpidl.pack([ONES, SHARED[4::5]], SHARED), ArgumentError, r"tensors\[1\] overlaps out"),
        (lambda: mpidl.pack([ONES.int()], SHARED.int(), scale=0.5), ArgumentError, "scale is 0.5"),
        (lambda: mpidl.pack([ONES], SHARED, scale=float("nan")), ArgumentError, "scale is nan"),
        (lambda: mpidl.pack([ONES], SHARED.to("meta")), DtypeError, "out is on device meta"),
        (lambda: mpidl.unpack(SHARED[:3], [ONES]), ArgumentError, "flat has 3 elements"),
        (lambda: mpidl.unpack(SHARED, [frozen()]), ArgumentError, r"tensors\[0\] is read-only"),
        (lambda: mpidl.unpack(SHARED, [ONES[:1].expand(4)]), ArgumentError, r"tensors\[0\] is read-only or"),
        (lambda: mpidl.unpack(SHARED, [SHARED[19:]]), ArgumentError, r"tensors\[0\] overlaps flat"),
        (lambda: mpidl.unpack(SHARED, [ONES[:3], ONES[2:]]), ArgumentError, r"tensors\[0\] and tensors\[1\]"),
        (lambda: mpidl.unpack(SHARED, [ONES, ONES]), ArgumentError, r"tensors\[0\] and tensors\[1\]"),
        (lambda: mpidl.unpack(SHARED, [ONES.int()]), DtypeError, "float64 cannot be packed as int32"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
    assert not SHARED.any()
    assert ONES.tolist() == [1, 1, 1, 1]


def test_tensors_may_share_memory_when_they_are_only_read() -> None:
    out = torch.zeros(8)
    tied = torch.arange(4.0)
    mpidl.pack([tied, tied], out)
    assert out.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
