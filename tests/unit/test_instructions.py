"""Every instruction set that this processor runs, against the numpy reference and bit for bit against each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_reference import reference_pack
from repeated_memory import WINDOW, repeated_memory

import mpidl
from mpidl.arrays import packing, view
from mpidl.arrays.view import ITEMSIZES
from mpidl.errors import ArgumentError
from mpidl.native import library

FLOATS = [
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("float64", "float64"),
]
INTEGERS = [(name, name) for name in library.DTYPES if "int" in name]
Use = Callable[[str], None]


def runs(instructions: str) -> bool:
    return bool(library.library().mpidl_supports(library.INSTRUCTIONS.index(instructions)))


@pytest.fixture
def use() -> Iterator[Use]:
    """Takes an instruction set for the rest of the test."""
    before = library.library().mpidl_instructions()

    def take(instructions: str) -> None:
        assert library.library().mpidl_use(library.INSTRUCTIONS.index(instructions)) == 0

    yield take
    assert library.library().mpidl_use(before) == 0


@pytest.fixture(params=library.INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, use: Use) -> str:
    """Each instruction set in turn, in use; those of other processors are skipped."""
    if not runs(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    use(request.param)
    return str(request.param)


def random_bytes(nbytes: int, seed: int = 7) -> np.ndarray:
    """Every kind of value turns up: of all bit patterns of float16 one in 32 is no finite number."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def tame(dtype: str, count: int) -> torch.Tensor:
    """Values of which none is a NaN, and whose scaled squares are far from the end of any dtype."""
    values = torch.from_numpy(np.random.default_rng(count).standard_normal(count) * 30)
    return values.to(getattr(torch, dtype))


def as_bytes(x: torch.Tensor) -> np.ndarray:
    return view.as_numpy(view.view(x)).view(np.uint8)


def gather(source: int, count: int, dtypes: tuple[str, str], out: int, scale: float) -> tuple[int, float, bool]:
    table = library.segments([count], [0])
    return library.gather(table, [source], dtypes[0], out, dtypes[1], scale=scale)


@pytest.mark.parametrize(
    ("dtypes", "scale"),
    [(pair, scale) for pair in FLOATS for scale in (1.0, -0.37)] + [(pair, 1.0) for pair in INTEGERS],
)
def test_every_length_and_alignment_agrees_with_the_reference(
    instructions: str, dtypes: tuple[str, str], scale: float
) -> None:
    source_size, out_size = (ITEMSIZES[name] for name in dtypes)
    values, written = tame(dtypes[0], 200), torch.zeros(200, dtype=getattr(torch, dtypes[1]))
    reference_pack([values], written, scale=scale)
    squares = np.concatenate([[0], np.cumsum(written.to(torch.float64).numpy() ** 2)])
    elements, expected = as_bytes(values), as_bytes(written)
    source, out = np.zeros(2048, np.uint8), np.zeros(2048, np.uint8)
    for count in range(201):
        shift, other = count * 7 % 64, count * 11 % 64  # each misalignment three times, in changing pairs
        source[shift : shift + count * source_size] = elements[: count * source_size]
        out.fill(0xA5)
        found = gather(source.ctypes.data + shift, count, dtypes, out.ctypes.data + other, scale)
        end = other + count * out_size
        assert (found[0], found[2]) == (count, True)
        assert found[1] == pytest.approx(squares[count], rel=1e-13)
        assert out[other:end].tobytes() == expected[: count * out_size].tobytes()
        assert (out[:other] == 0xA5).all()
        assert (out[end:] == 0xA5).all()


@pytest.mark.parametrize("values", ["all", "tame"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, -1e-3])
@pytest.mark.parametrize("dtypes", FLOATS, ids="-".join)
def test_all_sets_give_the_same_bits(use: Use, dtypes: tuple[str, str], scale: float, values: str) -> None:
    """That these are the right ones is test_packing's business, which holds one set to torch."""
    source_size, out_size = (ITEMSIZES[name] for name in dtypes)
    count = 60_001
    memory = random_bytes(count * source_size) if values == "all" else as_bytes(tame(dtypes[0], count))
    out = np.zeros(count * out_size, np.uint8)
    results = {}
    for name in filter(runs, library.INSTRUCTIONS):
        use(name)
        out.fill(0)
        found = gather(memory.ctypes.data, count, dtypes, out.ctypes.data, scale)
        results[name] = (*found, out.tobytes())
    expected = results["portable"]
    assert expected[2] is (values == "tame")
    for name, found in results.items():
        assert found[3] == expected[3], name
        assert found[2] == expected[2], name
        np.testing.assert_equal(found[1], expected[1], err_msg=name)  # exactly, or both are NaN


STREAMED = [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]


def cut(total: int) -> list[int]:
    """Lengths that bring every misalignment of a float32, a long run among them."""
    lengths = [*range(1, 40), 1000, 65_537]
    return [*lengths, total - sum(lengths)]


@pytest.mark.parametrize("shift", [0, 1, 8, 20])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")], ids="-".join
)
def test_large_calls_give_the_bits_of_portable_c(use: Use, dtypes: tuple[str, str], shift: int) -> None:
    """From 32 MiB on some sets write past the caches, on aligned places: no bit and no neighbour may change."""
    out_size = ITEMSIZES[dtypes[1]]
    counts = cut((1 << 25) // out_size + 100)
    offsets = np.cumsum([0, *counts[:-1]]) + np.arange(len(counts))  # a gap of one element after each segment
    table = packing.Table(tuple(counts), tuple(offsets.tolist()))
    memory = as_bytes(tame(dtypes[0], max(counts)))
    sources = [memory.ctypes.data] * len(counts)
    nbytes = table.extent * out_size
    results = {}
    for name in filter(runs, library.INSTRUCTIONS):
        use(name)
        out = np.full(nbytes + 64, 0xA5, np.uint8)
        packed = table.gather(sources, dtypes[0], out.ctypes.data + shift, dtypes[1], 0.25)
        assert packed.count == sum(counts)
        results[name] = (packed.sum_of_squares, out)
    expected = results.pop("portable")
    gaps = (offsets[1:, None] - 1) * out_size + np.arange(out_size) + shift
    assert (expected[1][gaps] == 0xA5).all()
    for name, found in results.items():
        assert found[0] == expected[0], name
        np.testing.assert_array_equal(found[1], expected[1], err_msg=name)


def test_counts_past_two_to_the_31(instructions: str) -> None:
    dtype = "uint8" if instructions == "portable" else "bfloat16"  # the smallest that has a kernel written for the set
    count, itemsize = 2**31 + 100_003, ITEMSIZES[dtype]
    one, two, three = (0x3F80, 0x4000, 0x4040) if dtype == "bfloat16" else (1, 2, 3)
    with repeated_memory(count * itemsize) as source, repeated_memory(count * itemsize) as out:
        values, written = source.view(f"uint{8 * itemsize}"), out.view(f"uint{8 * itemsize}")
        values[: 2 * WINDOW] = one  # the first end and the window that stands for all between
        values[-2 * WINDOW :] = one
        values[0], values[-1] = two, three
        found = gather(source.ctypes.data, count, (dtype, dtype), out.ctypes.data, 1.0)
        assert found == (count, count - 2 + 4.0 + 9.0, True)
        assert [int(written[k]) for k in (0, 1, 2**31, count - 2, count - 1)] == [two, one, one, one, three]


def test_ten_thousand_small_tensors(instructions: str) -> None:
    generator = np.random.default_rng(2)
    tensors = [np.full(size, k, np.float32) for k, size in enumerate(generator.integers(0, 30, 10_000))]
    out = np.zeros(sum(one.size for one in tensors), np.float32)
    packed = mpidl.pack(tensors, out)
    np.testing.assert_array_equal(out, np.concatenate(tensors))
    assert packed == (out.size, float(np.sum(out.astype(np.float64) ** 2)), True)
    back = [np.zeros_like(one) for one in tensors]
    assert mpidl.unpack(out, back) == packed
    assert all(np.array_equal(a, b) for a, b in zip(back, tensors, strict=True))


def chosen(tmp_path: Path, value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "MPIDL_INSTRUCTIONS"}
    if value is not None:
        environment["MPIDL_INSTRUCTIONS"] = value
    code = "import mpidl; from mpidl.native import library; print(library.instructions())"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("value", [None, "", *library.INSTRUCTIONS])
def test_the_environment_chooses_and_without_it_the_best_is_taken(tmp_path: Path, value: str | None) -> None:
    done = chosen(tmp_path, value)
    if value and not runs(value):
        assert f"MPIDL_INSTRUCTIONS='{value}', which this processor or this build does not run" in done.stderr
    else:
        assert done.stdout.strip() == (value or [name for name in library.INSTRUCTIONS if runs(name)][-1]), done.stderr


def test_an_unknown_choice_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_INSTRUCTIONS", "sse9")
    with pytest.raises(ArgumentError, match="'sse9', which is not known: expected one of portable"):
        library.library.__wrapped__()
