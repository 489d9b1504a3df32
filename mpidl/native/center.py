"""The extension's variable with a lock for each block, call by call; csrc/include/mpidl_center.h says what a pass does.

Nothing here knows an array, a topology or who waits: addresses and counts come checked.
"""

from __future__ import annotations

from typing import Any

from mpidl.native import library


def nbytes(count: int, block: int, dtype: str) -> int:
    """Returns the bytes of shared memory for `count` elements in blocks of `block` elements."""
    return int(library.library().mpidl_center_nbytes(count, block, library.DTYPES[dtype]))


def view(memory: Any, count: int, block: int, dtype: str, holder: int) -> Any:
    """Returns one rank's view of the variable, a C struct; the caller keeps `memory`.

    Args:
        memory: the mapped bytes.
        count: elements of the variable.
        block: elements that one lock guards.
        dtype: "float32" or "float64".
        holder: the mark of this rank's locks, above 0 and no other rank's.
    """
    library.library()
    address = int(library.ffi.cast("uintptr_t", library.ffi.from_buffer(memory)))
    return library.ffi.new("mpidl_center *", (address, count, block, library.DTYPES[dtype], holder))


def new_pass(
    start: int, count: int, addresses: tuple[int, int, int], *, scale: float = 1.0, replaces: bool = False
) -> Any:
    """Returns a pass over `count` elements from `start` on, not yet begun, a C struct.

    Args:
        start: the first element.
        count: elements.
        addresses: of the values, and of where the elements go before and after the change; 0 for none.
        scale: of each value.
        replaces: whether values replace the elements; otherwise they are added.
    """
    return library.ffi.new("mpidl_pass *", (start, count, *addresses, scale, int(replaces), 0, 0))


_move: Any = None


def move(center: Any, one: Any, patience: int) -> bool:
    """Moves a pass on, waiting for a lock for up to `patience` nanoseconds; returns whether the pass is over.

    Raises:
        DtypeError, ArgumentError: the pass makes no sense; nothing was changed.
    """
    global _move
    if _move is None:
        _move = library.library().mpidl_center_move
    progress = _move(center, one, patience)
    if progress < 0:
        library.fail(-progress, "the variable", "the variable", 1.0)
    return not progress


def take_away(center: Any, one: Any, dead: int) -> bool:
    """Frees the lock that a pass waits for if `dead`, whose process is gone, still holds the lock.

    Returns:
        Whether the block is whole; False: the block was being changed, and stays locked.
    """
    return not library.library().mpidl_center_take_away(center, one, dead)
