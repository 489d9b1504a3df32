"""The only importer of the compiled extension: loads it, calls it without the GIL, raises on bad statuses.

What the calls do stands in csrc/include/mpidl.h. Nothing here knows an array: addresses and counts come checked.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cffi

from mpidl.errors import ArgumentError, DtypeError, ExtensionError
from mpidl.native import environment
from mpidl.native.declarations import declarations

_LIBRARY = Path(__file__).with_name("_mpidl.so")
_INTERFACE = 8

#: Knows the types of csrc/include/*.h once `library` has been called.
ffi = cffi.FFI()

#: The code of every dtype that the extension knows.
DTYPES = {
    "float32": 0,
    "float64": 1,
    "float16": 2,
    "bfloat16": 3,
    "int8": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "uint8": 8,
    "uint16": 9,
    "uint32": 10,
    "uint64": 11,
    "bool": 8,
}

#: The instruction sets that the kernels are compiled for, by their codes in C.
INSTRUCTIONS = ("portable", "avx2", "avx512")

_BAD_DTYPE, _BAD_SCALE, _BAD_COUNT, _BAD_ADDRESS = 1, 2, 3, 4


@functools.cache
def library() -> Any:
    """The loaded extension, with the instructions that MPIDL_INSTRUCTIONS names, or else the processor's best.

    Raises:
        ExtensionError: it was never built, cannot be loaded, or belongs to another version of the package.
        ArgumentError: MPIDL_INSTRUCTIONS is not one of `INSTRUCTIONS`, or one that this processor does not run.
    """
    advice = "run `pip install .` (or `pip install -e .`) in mpidl's source tree, with a C compiler"
    if not _LIBRARY.exists():
        source = " (this is the source tree: it hides an installed mpidl from a Python that is started in it)"
        here = source if (_LIBRARY.parents[2] / "setup.py").exists() else ""
        raise ExtensionError(f"mpidl's extension {_LIBRARY} is missing{here}: {advice}")
    try:
        found, headers = _itself(_LIBRARY)
    except (OSError, AttributeError) as error:
        raise ExtensionError(f"mpidl's extension cannot be loaded ({error}): {advice}") from error
    if found != _INTERFACE:
        raise ExtensionError(f"mpidl's extension has interface {found}, not {_INTERFACE}: {advice}")
    _declare(headers)
    loaded = ffi.dlopen(str(_LIBRARY))
    wanted = environment.INSTRUCTIONS.read()
    if wanted:
        _use(loaded, wanted)
    return loaded


def _itself(path: Path) -> tuple[int, str]:
    """What a library says of itself: the number of its interface, and its headers (csrc/include/headers.c)."""
    two = cffi.FFI()
    two.cdef("int mpidl_interface(void); extern const char mpidl_headers[];")
    loaded = two.dlopen(str(path))
    return loaded.mpidl_interface(), two.string(loaded.mpidl_headers).decode()


@functools.cache
def _declare(headers: str) -> None:
    ffi.cdef(declarations(headers))


def _use(loaded: Any, wanted: str) -> None:
    choices = [name for code, name in enumerate(INSTRUCTIONS) if loaded.mpidl_supports(code)]
    if wanted not in choices:
        why = "which this processor or this build does not run" if wanted in INSTRUCTIONS else "which is not known"
        raise ArgumentError(
            f"{environment.INSTRUCTIONS.name}={wanted!r}, {why}: expected one of {', '.join(choices)}, or nothing"
        )
    loaded.mpidl_use(INSTRUCTIONS.index(wanted))


def instructions() -> str:
    """Which of `INSTRUCTIONS` the extension uses in this process; all give the same bits."""
    return INSTRUCTIONS[library().mpidl_instructions()]


class Segments(NamedTuple):
    """The frozen half of a segment table, as C arrays of int64."""

    counts: Any
    offsets: Any


def segments(counts: Sequence[int], offsets: Sequence[int]) -> Segments:
    """What `gather` and `scatter` take, made once; a memoryview of 64-bit words is taken without a copy."""
    return Segments(_words("int64_t[]", "q", counts), _words("int64_t[]", "q", offsets))


def _words(ctype: str, code: str, values: Sequence[int]) -> Any:
    # In half the time of ffi.new.
    return ffi.from_buffer(ctype, values if isinstance(values, memoryview) else array(code, values))


def gather(
    table: Segments, addresses: Sequence[int], source_dtype: str, flat: int, flat_dtype: str, *, scale: float
) -> tuple[int, float, bool]:
    """Pack the segments at `addresses` into the buffer at `flat`.

    Returns:
        Elements written, the sum of their squares, whether all are finite.
    """
    call, packed = library().mpidl_gather, ffi.new("mpidl_packed *")
    arguments = _common(table, addresses, source_dtype, flat, flat_dtype)
    status = call(*arguments, scale, packed)
    if status:
        fail(status, source_dtype, flat_dtype, scale)
    return packed.count, packed.sum_of_squares, bool(packed.finite)


def scatter(
    table: Segments, addresses: Sequence[int], target_dtype: str, flat: int, flat_dtype: str, *, scale: float
) -> tuple[int, float, bool]:
    """Unpack the buffer at `flat` into the segments at `addresses`; returns what `gather` does."""
    call, packed = library().mpidl_scatter, ffi.new("mpidl_packed *")
    arguments = _common(table, addresses, target_dtype, flat, flat_dtype)
    status = call(*arguments, scale, packed)
    if status:
        fail(status, flat_dtype, target_dtype, scale)
    return packed.count, packed.sum_of_squares, bool(packed.finite)


def _common(
    table: Segments, addresses: Sequence[int], dtype: str, flat: int, flat_dtype: str
) -> tuple[int, Any, Any, Any, int, int, int]:
    check_call(len(table.counts), addresses, dtype, flat_dtype)
    pointers = _words("uintptr_t[]", "Q", addresses)
    return len(addresses), pointers, table.counts, table.offsets, _code(dtype), flat, _code(flat_dtype)


def check_call(segments: int, addresses: Sequence[int], dtype: str, flat_dtype: str) -> None:
    """Refuses what the C side cannot see, wherever the memory lies."""
    if len(addresses) != segments:
        raise ArgumentError(f"addresses has {len(addresses)} entries, the table has {segments}")
    if "bool" in (dtype, flat_dtype) and dtype != flat_dtype:
        raise DtypeError(f"bool is packed as bool only, found {dtype} and {flat_dtype}")  # 2 is no bool


def _code(dtype: str) -> int:
    return DTYPES.get(dtype, -1)


def fail(status: int, source: str, target: str, scale: float) -> None:
    """Raises what a status of csrc/include/mpidl.h means."""
    if status == _BAD_DTYPE:
        raise DtypeError(
            f"{source} cannot be packed as {target}: the dtypes must be equal, or one float32 and the other "
            "bfloat16 or float16"
        )
    if status == _BAD_SCALE:
        whole = "int" in source or source == "bool"
        wanted = "exactly 1" if whole else "finite, and in float32 neither infinite nor vanishing"
        raise ArgumentError(f"scale is {scale!r}; for {source} it must be {wanted}")
    if status == _BAD_COUNT:
        raise ArgumentError("a count or an offset is negative or too large")
    if status == _BAD_ADDRESS:
        raise ArgumentError("an address is null where there are elements")
    raise ExtensionError(f"mpidl's extension returned the unknown status {status}")
