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

_LIBRARY = Path(__file__).with_name("_mpidl.so")
_INTERFACE = 7

# As in csrc/include/mpidl.h, csrc/include/mpidl_node.h and csrc/include/mpidl_center.h.
ffi = cffi.FFI()
ffi.cdef(
    """
    typedef struct { int64_t count; double sum_of_squares; int32_t finite; } mpidl_packed;
    int mpidl_gather(int64_t segments, const uintptr_t *addresses, const int64_t *counts,
                     const int64_t *offsets, int source_dtype, uintptr_t flat, int flat_dtype,
                     double scale, mpidl_packed *packed);
    int mpidl_scatter(int64_t segments, const uintptr_t *addresses, const int64_t *counts,
                      const int64_t *offsets, int target_dtype, uintptr_t flat, int flat_dtype, double scale,
                      mpidl_packed *packed);
    int mpidl_supports(int instructions);
    int mpidl_use(int instructions);
    int mpidl_instructions(void);
    int mpidl_interface(void);

    typedef struct {
        int32_t wish, streams, turns;
        int64_t looked;
        double costs[2];
    } mpidl_writing;
    typedef struct {
        uintptr_t memory;
        int64_t small_nbytes, piece_nbytes;
        int32_t rank, ranks;
        int64_t spin;
        uint32_t calls, rounds;
        mpidl_writing writing;
    } mpidl_node;
    typedef struct mpidl_job mpidl_job;
    struct mpidl_job {
        int64_t words[2];
        int32_t kind, op, dtype, root;
        int64_t count, total;
        double divisor;
        uintptr_t input, output;
        int64_t segments;
        const uintptr_t *addresses;
        const int64_t *counts, *offsets;
        int64_t base;
        double scale;
        int32_t source_dtype;
        int32_t finite;
        int64_t packing, reducing;
        int32_t phase, agreed, taken, differs;
        int64_t rounds, staged, produced, consumed, idle_since;
        mpidl_job *next;
        int32_t ended, result;
    };
    int64_t mpidl_segment_nbytes(int32_t ranks, int64_t small_nbytes, int64_t piece_nbytes);
    int mpidl_reduce(const uintptr_t *sources, int32_t number, uintptr_t out, int64_t count, int dtype, int op,
                     double divisor);
    int mpidl_reduces(int dtype, int op);
    int mpidl_node_advance(mpidl_node *node, mpidl_job *job, int64_t patience);
    void mpidl_node_give_up(mpidl_node *node);
    int mpidl_node_repeat(mpidl_node *node, mpidl_job *job, int64_t number, const void *input, void *output,
                          int64_t patience);
    typedef struct mpidl_helper mpidl_helper;
    mpidl_helper *mpidl_helper_start(mpidl_node *node);
    void mpidl_helper_give(mpidl_helper *helper, mpidl_job *job);
    int mpidl_helper_wait(mpidl_helper *helper, mpidl_job *job, int64_t patience);
    void mpidl_helper_stop(mpidl_helper *helper);

    typedef struct {
        uintptr_t memory;
        int64_t count, block;
        int32_t dtype;
        uint32_t holder;
    } mpidl_center;
    typedef struct {
        int64_t start, count;
        uintptr_t values, before, after;
        double scale;
        int32_t replaces, waits_for;
        int64_t done;
    } mpidl_pass;
    int64_t mpidl_center_nbytes(int64_t count, int64_t block, int dtype);
    int mpidl_center_move(const mpidl_center *center, mpidl_pass *pass, int64_t patience);
    int mpidl_center_take_away(const mpidl_center *center, const mpidl_pass *pass, uint32_t dead);
    """
)

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
        loaded = ffi.dlopen(str(_LIBRARY))
        found = loaded.mpidl_interface()
    except (OSError, AttributeError) as error:
        raise ExtensionError(f"mpidl's extension cannot be loaded ({error}): {advice}") from error
    if found != _INTERFACE:
        raise ExtensionError(f"mpidl's extension has interface {found}, not {_INTERFACE}: {advice}")
    wanted = environment.INSTRUCTIONS.read()
    if wanted:
        _use(loaded, wanted)
    return loaded


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
    packed = ffi.new("mpidl_packed *")
    arguments = _common(table, addresses, source_dtype, flat, flat_dtype)
    status = library().mpidl_gather(*arguments, scale, packed)
    if status:
        fail(status, source_dtype, flat_dtype, scale)
    return packed.count, packed.sum_of_squares, bool(packed.finite)


def scatter(
    table: Segments, addresses: Sequence[int], target_dtype: str, flat: int, flat_dtype: str, *, scale: float
) -> tuple[int, float, bool]:
    """Unpack the buffer at `flat` into the segments at `addresses`; returns what `gather` does."""
    packed = ffi.new("mpidl_packed *")
    arguments = _common(table, addresses, target_dtype, flat, flat_dtype)
    status = library().mpidl_scatter(*arguments, scale, packed)
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
