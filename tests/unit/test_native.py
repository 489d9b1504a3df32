"""The extension below the arrays: loading, statuses, unaligned memory, large offsets (casts: test_packing)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mpidl.arrays import view
from mpidl.errors import ArgumentError, DtypeError, ExtensionError
from mpidl.native import library

DTYPES = [name for name in library.DTYPES if name != "bfloat16"]


def gather(source: np.ndarray, out: np.ndarray, scale: float = 1.0) -> tuple[int, float, bool]:
    return library.gather(
        library.segments([source.size], [0]),
        [source.ctypes.data],
        str(source.dtype),
        out.ctypes.data,
        str(out.dtype),
        scale=scale,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_mean_the_same_dtype_in_c(dtype: str) -> None:
    values = np.array([3, 0, 1, 2]).astype(dtype)
    out = np.zeros(5, dtype)
    squares = np.sum(values.astype(np.float64) ** 2)
    assert gather(values, out) == (4, squares, True)
    np.testing.assert_array_equal(out[:4], values)
    assert out[4] == 0


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_negative_integers_are_signed_in_the_sum_of_squares(dtype: str) -> None:
    low = np.iinfo(dtype).min
    assert gather(np.array([low, -1], dtype), np.zeros(2, dtype)) == (2, float(low) ** 2 + 1, True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_large_unsigned_integers_are_not_negative_in_it(dtype: str) -> None:
    high = np.iinfo(dtype).max
    assert gather(np.array([high], dtype), np.zeros(1, dtype)) == (1, float(high) ** 2, True)


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize(("source", "out"), [("float32", "float32"), ("float32", "float16"), ("float64", "float64")])
def test_any_alignment(source: str, out: str, shift: int) -> None:
    count = 1037
    values = np.arange(count).astype(source)
    memory = np.zeros(values.nbytes + 16, np.uint8)
    memory[shift : shift + values.nbytes] = values.view(np.uint8)
    target = np.zeros(count * np.dtype(out).itemsize + 16, np.uint8)
    table = library.segments([count], [0])
    other = 7 - shift
    library.gather(table, [memory.ctypes.data + shift], source, target.ctypes.data + other, out, scale=0.5)
    end = other + count * np.dtype(out).itemsize
    np.testing.assert_array_equal(target[other:end].view(out), (values * 0.5).astype(out))
    assert not target[:other].any()
    assert not target[end:].any()


def test_finite_values_whose_squares_overflow_are_finite() -> None:
    values = np.full(40, 1e200)
    out = np.zeros(40)
    assert gather(values, out) == (40, np.inf, True)
    values[39] = np.nan
    assert gather(values, out)[2] is False


def test_float32_squares_do_not_overflow() -> None:
    values = np.full(100, np.finfo(np.float32).max)
    count, squares, finite = gather(values, np.zeros(100, np.float32))
    assert (count, finite) == (100, True)
    assert squares == pytest.approx(100 * float(values[0]) ** 2, rel=1e-12)


def test_the_sum_of_squares_is_accurate_in_long_runs() -> None:
    values = np.full(3_000_001, 0.1, np.float32)
    squares = gather(values, np.zeros_like(values))[1]
    # Sixteen chains of additions, each off by at most half a unit per addition.
    assert squares == pytest.approx(values.size * float(values[0]) ** 2, rel=values.size / 16 * 2.0**-53)


def test_no_segments_and_empty_segments_read_no_address() -> None:
    assert library.gather(library.segments([], []), [], "float32", 0, "float32", scale=1.0) == (0, 0.0, True)
    empty = library.segments([0, 0], [0, 5])
    assert library.scatter(empty, [0, 0], "float32", 0, "bfloat16", scale=1.0) == (0, 0.0, True)


def test_offsets_past_two_gigabytes() -> None:
    memory = np.zeros(2**31 + 64, np.uint8)  # the pages between are never touched
    last = np.arange(60, dtype=np.uint8)
    table = library.segments([4, 60], [0, 2**31 + 4])
    first = np.arange(4, dtype=np.uint8)
    addresses = [first.ctypes.data, last.ctypes.data]
    assert library.gather(table, addresses, "uint8", memory.ctypes.data, "uint8", scale=1.0)[0] == 64
    np.testing.assert_array_equal(memory[2**31 + 4 :], last)
    np.testing.assert_array_equal(memory[:4], first)


@pytest.mark.parametrize(
    ("source", "out", "scale", "error", "words"),
    [
        ("float32", "float64", 1.0, DtypeError, "float32 cannot be packed as float64"),
        ("int32", "float32", 1.0, DtypeError, "int32"),
        ("uint8", "bool", 1.0, DtypeError, "bool"),
        ("complex64", "complex64", 1.0, DtypeError, "complex64"),
        ("int32", "int32", 0.5, ArgumentError, "scale"),
        ("bool", "bool", 2.0, ArgumentError, "scale"),
        ("float32", "float32", float("nan"), ArgumentError, "scale"),
        ("float32", "float32", 1e300, ArgumentError, "scale"),
        ("float32", "float16", 1e-300, ArgumentError, "scale"),
        ("float64", "float64", float("inf"), ArgumentError, "scale"),
    ],
)
def test_refusals_write_nothing(source: str, out: str, scale: float, error: type[Exception], words: str) -> None:
    values, target = np.ones(3, source), np.full(3, 7).astype(out)
    before = target.copy()
    with pytest.raises(error, match=words):
        gather(values, target, scale)
    np.testing.assert_array_equal(target, before)


@pytest.mark.parametrize(("counts", "offsets"), [([-1], [0]), ([1], [-1]), ([2**62], [0]), ([1], [2**62])])
def test_counts_that_cannot_be_are_refused(counts: list[int], offsets: list[int]) -> None:
    memory = np.zeros(4)
    table = library.segments(counts, offsets)
    with pytest.raises(ArgumentError, match="negative or too large"):
        library.gather(table, [memory.ctypes.data], "float64", memory.ctypes.data, "float64", scale=1.0)


def test_null_addresses_and_wrong_numbers_of_them_are_refused() -> None:
    memory = np.zeros(4)
    table = library.segments([1, 1], [0, 1])
    with pytest.raises(ArgumentError, match="null"):
        library.gather(table, [memory.ctypes.data, 0], "float64", memory.ctypes.data, "float64", scale=1.0)
    with pytest.raises(ArgumentError, match="null"):
        library.scatter(table, [memory.ctypes.data] * 2, "float64", 0, "float64", scale=1.0)
    with pytest.raises(ArgumentError, match="1 entries, the table has 2"):
        library.gather(table, [memory.ctypes.data], "float64", memory.ctypes.data, "float64", scale=1.0)


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "_mpidl.so")
    load = library.library.__wrapped__
    with pytest.raises(ExtensionError, match="pip install"):
        load()
    (tmp_path / "_mpidl.so").write_bytes(b"not a library")
    with pytest.raises(ExtensionError, match="cannot be loaded"):
        load()


def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_INTERFACE", -1)
    with pytest.raises(ExtensionError, match="not -1"):
        library.library.__wrapped__()


def test_threads_pack_at_once() -> None:
    sources = [np.full(200_000, k, np.float32) for k in range(4)]
    targets = [np.zeros(200_000, np.float32) for _ in sources]
    results: dict[int, tuple[int, float, bool]] = {}

    def work(k: int) -> None:
        results[k] = gather(sources[k], targets[k], 2.0)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: (200_000, 200_000 * 4.0 * k * k, True) for k in range(4)}


def test_neither_torch_nor_mpi_is_loaded_by_packing(tmp_path: Path) -> None:
    code = "import sys, mpidl; mpidl.pack; print(sorted({'torch', 'mpi4py'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_item_sizes_agree_with_numpy() -> None:
    for name, size in view.ITEMSIZES.items():
        if name != "bfloat16":
            assert np.dtype(name).itemsize == size
