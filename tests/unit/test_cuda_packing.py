"""Packing on a device against the numpy reference: the kernels' own source, compiled for the host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing_reference import _decoded, _encoded

from mpidl.arrays.view import ITEMSIZES
from mpidl.errors import ArgumentError, DeviceError, DtypeError, ExtensionError
from mpidl.native import cuda as _cuda
from mpidl.native import library

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_host"))
from host_build import CSRC, Memory, allocations, finish, host_cuda, launches

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
PAIRS = [(one, one) for one in FLOATS + INTEGERS] + [
    pair for half in ("float16", "bfloat16") for pair in ((half, "float32"), ("float32", half))
]
ODD = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 257, 1023, 4099)


def raw(dtype: str) -> Any:
    return np.uint16 if dtype == "bfloat16" else np.dtype(dtype).type


def values(dtype: str, count: int, rng: np.random.Generator, strange: bool) -> np.ndarray[Any, Any]:
    """Numbers of all sizes, subnormals among them; infinities and NaN too, where they are wanted."""
    if dtype in INTEGERS:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, raw(dtype), endpoint=True)
    plain = rng.standard_normal(count) * 2.0 ** rng.integers(-20, 12, count)
    odd = rng.integers(0, 40, count)
    plain[odd == 0] = 1e-7
    if strange:
        plain[odd == 1], plain[odd == 2] = np.inf, np.nan
    if dtype == "bfloat16":
        return _encoded(plain.astype(np.float32), "bfloat16")
    with np.errstate(over="ignore"):
        return plain.astype(dtype)


def expected(source: np.ndarray[Any, Any], from_: str, to: str, scale: float) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        if scale == 1.0 and from_ == to:
            return source
        wide = _decoded(source, from_)
        return _encoded(wide * wide.dtype.type(scale), to)


def assert_same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], dtype: str) -> None:
    """Equal bits; where the reference has a NaN any NaN will do."""
    if dtype in FLOATS:
        nan = np.isnan(_decoded(wanted, dtype))
        np.testing.assert_array_equal(np.isnan(_decoded(found, dtype)), nan)
        found, wanted = found[~nan], wanted[~nan]
    np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8))


class Case:
    """Segments on a device, the flat buffer they go into and come from, and what numpy makes of them."""

    def __init__(self, counts: tuple[int, ...], segment: str, flat: str, shift: int = 0, gap: int = 1) -> None:
        rng = np.random.default_rng(len(counts) + shift)
        self.counts, self.segment, self.flat = counts, segment, flat
        self.offsets = tuple(int(x) for x in np.cumsum([0, *(count + gap for count in counts)])[:-1])
        self.total = self.offsets[-1] + counts[-1] if counts else 0
        self.strange = shift % 2 == 1
        self.data = [values(segment, count, rng, self.strange) for count in counts]
        self.starts, end = [], 0  # in one memory, each at an alignment of its own
        for s, one in enumerate(self.data):
            self.starts.append(end + (shift + 3 * s * (shift > 0)) % 16)
            end += (one.nbytes + 16) // 16 * 16 + 16
        self.memory = Memory(end)
        self.buffer = Memory(self.total * ITEMSIZES[flat], shift)
        self.table = _cuda.Segments(host_cuda(), 0, counts, self.offsets)

    @property
    def addresses(self) -> list[int]:
        return [self.memory.address + start if c else 0 for start, c in zip(self.starts, self.counts, strict=True)]

    def write_segments(self) -> None:
        image = np.zeros(self.memory.nbytes, np.uint8)
        for start, one in zip(self.starts, self.data, strict=True):
            image[start : start + one.nbytes] = one.view(np.uint8)
        self.memory.write(image)

    def read_segments(self) -> list[np.ndarray[Any, Any]]:
        image = self.memory.read()
        return [
            image[start : start + one.nbytes].copy().view(one.dtype)
            for start, one in zip(self.starts, self.data, strict=True)
        ]

    def check_gather(self, scale: float) -> None:
        self.write_segments()
        before = np.full(self.total, 7, raw(self.flat))
        self.buffer.write(before)
        ticket = self.table.gather(self.addresses, self.segment, self.buffer.address, self.flat, scale=scale, stream=0)
        wanted = before.copy()
        for one, offset in zip(self.data, self.offsets, strict=True):
            wanted[offset : offset + one.size] = expected(one, self.segment, self.flat, scale)
        self.check_result(self.table.result(ticket), [wanted[o : o + c] for o, c in self.places()], self.flat)
        assert_same(self.buffer.read(raw(self.flat)), wanted, self.flat)

    def check_scatter(self, scale: float) -> None:
        flat = values(self.flat, self.total, np.random.default_rng(5), self.strange)
        self.buffer.write(flat)
        ticket = self.table.scatter(self.addresses, self.segment, self.buffer.address, self.flat, scale=scale, stream=0)
        wanted = [expected(flat[o : o + c], self.flat, self.segment, scale) for o, c in self.places()]
        self.check_result(self.table.result(ticket), wanted, self.segment)
        for found, one in zip(self.read_segments(), wanted, strict=True):
            assert_same(found, one, self.segment)

    def places(self) -> list[tuple[int, int]]:
        return list(zip(self.offsets, self.counts, strict=True))

    def check_result(self, found: tuple[int, float, bool], written: list[np.ndarray[Any, Any]], dtype: str) -> None:
        with np.errstate(all="ignore"):
            wide = np.concatenate([_decoded(one, dtype).astype(np.float64) for one in written] or [np.zeros(0)])
            total = float(np.sum(wide * wide))
        count, squares, finite = found
        assert (count, finite) == (sum(self.counts), bool(np.isfinite(wide).all()))
        assert squares == pytest.approx(total, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(("segment", "flat"), PAIRS)
def test_every_pair_of_dtypes_at_every_alignment(segment: str, flat: str) -> None:
    for shift in (*range(9), 11, 14, 15):
        case = Case((33, 0, 1, 523, 17, 5, 0), segment, flat, shift)
        for scale in (1.0,) if segment in INTEGERS else (1.0, -0.3):
            case.check_gather(scale)
            case.check_scatter(scale)
        case.table.free()


@pytest.mark.parametrize(("segment", "flat"), [("float32", "bfloat16"), ("float16", "float32"), ("float64", "float64")])
def test_odd_sizes_without_gaps(segment: str, flat: str) -> None:
    case = Case(ODD, segment, flat, gap=0)
    case.check_gather(1 / 3)
    case.check_scatter(1 / 3)


@pytest.mark.parametrize("segments", [0, 1, 2, 31, 1000])
def test_tables_of_many_segments(segments: int) -> None:
    rng = np.random.default_rng(segments)
    case = Case(tuple(int(n) for n in rng.choice([0, 0, 1, 2, 3, 5, 8, 60, 300], segments)), "float32", "float32")
    case.check_gather(1.0)
    case.check_scatter(0.5)


def test_more_than_the_warps_take_at_once() -> None:
    """The host's CUDA has 3 multiprocessors: 192 warps, so each has more than its least share here."""
    case = Case((1, 300_001, 40_000), "float32", "float16", gap=3)
    case.check_gather(1.0)
    case.check_scatter(3.0)


def test_a_call_is_one_launch_and_allocates_nothing() -> None:
    case = Case((100,) * 50, "float32", "float32")
    before = launches(), allocations()
    for _ in range(3 * _cuda.SLOTS):
        case.table.gather(case.addresses, "float32", case.buffer.address, "float32", scale=1.0, stream=0)
    finish()
    assert (launches() - before[0], allocations() - before[1]) == (3 * _cuda.SLOTS, 0)


def test_a_call_returns_before_anything_has_moved() -> None:
    case = Case((64,), "float32", "float32")
    case.write_segments()
    case.buffer.write(np.zeros(64, np.float32))
    ticket = case.table.gather(case.addresses, "float32", case.buffer.address, "float32", scale=1.0, stream=0)
    assert not case.buffer.read(np.float32).any()
    case.table.result(ticket)
    assert_same(case.buffer.read(np.float32), case.data[0], "float32")


def test_addresses_of_a_call_under_way_are_not_changed_by_the_next() -> None:
    """The ring of pinned address slots: each slot waits for the call that used it last."""
    table = _cuda.Segments(host_cuda(), 0, (8,), (0,))
    sources, flats = [Memory(32) for _ in range(10)], [Memory(32) for _ in range(10)]
    for i, (source, flat) in enumerate(zip(sources, flats, strict=True)):
        source.write(np.full(8, i, np.float32))
        table.gather([source.address], "float32", flat.address, "float32", scale=1.0, stream=0)
    finish()
    assert [int(flat.read(np.float32)[3]) for flat in flats] == list(range(10))


def test_results_belong_to_their_calls_until_the_slots_come_round() -> None:
    table = _cuda.Segments(host_cuda(), 0, (2,), (0,))
    source, flat = Memory(8), Memory(8)
    source.write(np.array([3, 4], np.float32))
    tickets = [
        table.gather([source.address], "float32", flat.address, "float32", scale=scale, stream=0)
        for scale in (1.0, 2.0, 3.0, 4.0)
    ]
    assert [table.result(ticket)[1] for ticket in reversed(tickets)] == [400.0, 225.0, 100.0, 25.0]
    again = table.gather([source.address], "float32", flat.address, "float32", scale=5.0, stream=0)
    with pytest.raises(DeviceError, match="status 101"):
        table.result(tickets[0])
    assert table.result(tickets[1]) == (2, 100.0, True)
    assert table.result(again) == (2, 625.0, True)


def test_the_order_is_the_callers_streams() -> None:
    """On two streams nothing is ordered, unless one waits for an event of the other."""
    cuda = host_cuda()
    streams = [cuda.make("stream_make", 0) for _ in range(2)]
    table = _cuda.Segments(cuda, 0, (4,), (0,))
    source, middle, last = Memory(16), Memory(16), Memory(16)
    for memory in (source, middle, last):
        memory.write(np.full(4, 9 if memory is source else 0, np.float32))
    table.gather([source.address], "float32", middle.address, "float32", scale=1.0, stream=streams[0])
    event = cuda.make("event_make", 0)
    cuda.call("event_record", 0, event, streams[0])
    cuda.call("copy", 0, last.address, middle.address, 16, streams[1])
    finish(streams[1])
    assert not last.read().any()
    cuda.call("stream_wait", 0, streams[1], event)
    cuda.call("copy", 0, last.address, middle.address, 16, streams[1])
    assert cuda.make("event_done", 0, event) in (0, 1)
    finish(streams[1])
    assert last.read(np.float32).tolist() == [9.0] * 4


def test_bad_calls_are_refused_as_on_the_host() -> None:
    table = _cuda.Segments(host_cuda(), 0, (1,), (0,))
    memory = Memory(8)
    at = memory.address
    for addresses, dtype, flat, flat_dtype, scale, error, words in [
        ([at], "float64", at, "float32", 1.0, DtypeError, "float64 cannot be packed as float32"),
        ([at], "int32", at, "int32", 2.0, ArgumentError, "scale is 2.0"),
        ([at], "float32", at, "float32", float("nan"), ArgumentError, "scale is nan"),
        ([0], "float32", at, "float32", 1.0, ArgumentError, "address is null"),
        ([at], "float32", 0, "float32", 1.0, ArgumentError, "address is null"),
        ([at, at], "float32", at, "float32", 1.0, ArgumentError, "2 entries"),
        ([at], "bool", at, "uint8", 1.0, DtypeError, "bool is packed as bool only"),
    ]:
        for move in (table.gather, table.scatter):
            either = "cannot be packed as|bool" if move == table.scatter and error is DtypeError else words
            with pytest.raises(error, match=either):
                move(addresses, dtype, flat, flat_dtype, scale=scale, stream=0)
    with pytest.raises(DeviceError, match="status 3"):
        _cuda.Segments(host_cuda(), 0, (-1,), (0,))
    with pytest.raises(DeviceError, match="invalid device ordinal"):
        _cuda.Segments(host_cuda(), 7, (1,), (0,))


def test_a_missing_or_foreign_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExtensionError, match=r"built without CUDA.*nvcc"):
        _cuda.Cuda(tmp_path / "none.so")
    with pytest.raises(ExtensionError, match="cannot be loaded"):
        _cuda.Cuda(Path(library.__file__).with_name("_mpidl.so"))


def nvcc_flags() -> list[str]:
    """setup.py's own, but for the architectures."""
    text = (CSRC.parent / "setup.py").read_text()
    found = re.search(r"^NVCC_FLAGS = \[(.*?)^\]", text, re.S | re.M)
    assert found, "setup.py has no NVCC_FLAGS"
    return re.findall(r'"(-[^"]*)"', found[1])


def test_every_kernel_really_moves_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Reads the PTX: wide loads and stores in each of the kernels, and no array that lies in local memory."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed, so there is no PTX to read")
    ptx = tmp_path / "packing.ptx"
    flags = [flag for flag in nvcc_flags() if flag.startswith(("-O", "-std", "-fmad"))]
    command = [nvcc, "-ptx", "-arch=compute_80", *flags, f"-I{CSRC}", "-o", str(ptx), str(CSRC / "cuda/packing.cu")]
    subprocess.run(command, check=True, capture_output=True)
    kernels = re.split(r"^\.visible \.entry |^\.entry ", ptx.read_text(), flags=re.M)[1:]
    assert len(kernels) == len(PAIRS)
    for kernel in kernels:
        name = kernel.partition("(")[0]
        assert "ld.global.v2.u64" in kernel, name
        assert "st.global.v2.u64" in kernel, name
        assert "__local_depot" not in kernel, name
        assert "fma.rn" not in kernel, f"{name} would give other bits than the processor"
