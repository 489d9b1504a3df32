"""The extension's collectives in shared memory, call by call; what they do stands in csrc/include/mpidl_node.h.

Nothing here knows arrays, communicators or waiting ranks: addresses and counts come checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpidl.native import library

KINDS = {"agree": 0, "allreduce": 1, "reduce": 2, "reduce_scatter": 3, "allgather": 4, "broadcast": 5}
OPERATIONS = {"sum": 0, "mean": 0, "prod": 1, "min": 2, "max": 3}

DONE, WAITING, DIFFERS = 0, 1, 2


def segment_nbytes(ranks: int, small_nbytes: int, piece_nbytes: int) -> int:
    """Bytes of shared memory for so many ranks; see csrc/include/mpidl_node.h for the other two."""
    return int(library.library().mpidl_segment_nbytes(ranks, small_nbytes, piece_nbytes))


def reduces(dtype: str, op: str) -> bool:
    """Whether `op` on `dtype` is carried out here."""
    return bool(library.library().mpidl_reduces(library.DTYPES.get(dtype, -1), OPERATIONS[op]))


def end(memory: int, rank: int, ranks: int, *, small_nbytes: int, piece_nbytes: int, spin: int) -> Any:
    """One rank's end of the segment at the address `memory`, a C struct; `spin` in nanoseconds."""
    return library.ffi.new("mpidl_node *", (memory, small_nbytes, piece_nbytes, rank, ranks, spin, 0, 0))


def job(
    signature: tuple[int, int],
    kind: str,
    dtype: str,
    count: int,
    addresses: tuple[int, int] = (0, 0),
    *,
    op: str = "sum",
    root: int = 0,
    total: int = 0,
    divisor: float = 1.0,
) -> Any:
    """A call, not yet begun, a C struct; `addresses` are of input and output, `total` is of all blocks if not full."""
    codes = KINDS[kind], OPERATIONS[op], library.DTYPES[dtype]
    return library.ffi.new("mpidl_job *", (signature, *codes, root, count, total, divisor, *addresses))


def pointers(addresses: Sequence[int]) -> Any:
    """Addresses as a C array, which C does not keep alive."""
    return library.ffi.new("uintptr_t[]", list(addresses))


def read_gather_list(
    one: Any, table: library.Segments, addresses: Any, dtype: str, *, scale: float, base: int = 0
) -> None:
    """Makes a job read its input from the segments at `addresses`, from element `base` on.

    Args:
        one: the job.
        table: outlives it.
        addresses: of `pointers`, outlives it; 0 stands for zeros.
        dtype: of the segments.
        scale: of each element.
        base: where the input begins in the table's flat order.
    """
    one.segments, one.addresses, one.counts, one.offsets = len(addresses), addresses, table.counts, table.offsets
    one.source_dtype, one.scale, one.base = library.DTYPES[dtype], scale, base


def reduce(addresses: Sequence[int], out: int, count: int, *, dtype: str, op: str, divisor: float = 1.0) -> None:
    """Writes op(first, second, ...) / divisor to `out`; each lies apart from it, or begins where it does.

    Raises:
        DtypeError, ArgumentError: it makes no sense.
    """
    arguments = len(addresses), out, count, library.DTYPES[dtype], OPERATIONS[op], divisor
    status = library.library().mpidl_reduce(pointers(addresses), *arguments)
    if status:
        library.fail(status, dtype, dtype, 1.0)


_advance: Any = None
_repeat: Any = None


def advance(node: Any, one: Any, patience: int) -> int:
    """Moves a job on, waiting for up to `patience` nanoseconds; DONE, WAITING or DIFFERS.

    Raises:
        ExtensionError, DtypeError, ArgumentError: the job makes no sense; nothing has been sent.
    """
    global _advance
    if _advance is None:
        _advance = library.library().mpidl_node_advance
    return _checked(_advance(node, one, patience), one)


def _checked(progress: int, one: Any) -> int:
    if progress < 0:
        library.fail(-progress, f"dtype {one.source_dtype}", f"dtype {one.dtype}", one.scale)
    return progress


def start_progress_thread(node: Any) -> Any:
    """Starts a thread that moves jobs on and takes no GIL; None if there cannot be one. Stop it before `node` goes."""
    return library.library().mpidl_progress_thread_start(node) or None


def give(thread: Any, one: Any) -> None:
    """Hands a job to the progress thread; nobody else may touch the job until `wait` has said that it ended."""
    library.library().mpidl_progress_thread_give(thread, one)


def wait(thread: Any, one: Any, patience: int) -> int:
    """Says what has become of a job, after at most `patience` nanoseconds; otherwise as `advance`."""
    return _checked(library.library().mpidl_progress_thread_wait(thread, one, patience), one)


def stop_progress_thread(thread: Any) -> None:
    """Ends the thread, within milliseconds, in whatever job it is."""
    library.library().mpidl_progress_thread_stop(thread)


def buffers(source: Any, target: Any) -> tuple[Any, Any]:
    """The memory of two arrays as `repeat` takes it.

    Raises:
        BufferError, TypeError, ValueError: they are not contiguous, or `target` is read-only.
    """
    return library.ffi.from_buffer(source), library.ffi.from_buffer(target, require_writable=True)


def repeat(node: Any, one: Any, number: int, memory: tuple[Any, Any], patience: int) -> int:
    """Begins a job anew as call `number`, from one buffer to another, and moves it on as `advance` does."""
    global _repeat
    if _repeat is None:
        _repeat = library.library().mpidl_node_repeat
    progress: int = _repeat(node, one, number, *memory, patience)
    return progress


def give_up(node: Any) -> None:
    """Ends this rank's part half-way: no call of any rank will complete here any more."""
    library.library().mpidl_node_give_up(node)
