"""Memory of many gigabytes that takes up little: one small file, mapped again and again, between two private ends."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

WINDOW = 1 << 24
_ANYWHERE = -1
_MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0x10, 0x4000, 0x8000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(address: int | None, nbytes: int, access: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, nbytes, access, flags, file, 0)
    if found in (None, _FAILED):
        raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes")
    return int(found)


@contextmanager
def repeated_memory(nbytes: int) -> Iterator[np.ndarray]:
    """`nbytes` of uint8, of which all whole windows but the first and the last lie on the same `WINDOW` bytes."""
    anonymous, both = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE
    shared = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE  # faults one by one would take longer than the packing
    start = _map(None, nbytes, both, anonymous | _MAP_NORESERVE, _ANYWHERE)
    file = os.memfd_create("repeated")
    try:
        os.ftruncate(file, WINDOW)
        for offset in range(WINDOW, nbytes - 2 * WINDOW, WINDOW):
            _map(start + offset, WINDOW, both, shared, file)
        yield np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(start))
    finally:
        os.close(file)
        _libc.munmap(start, nbytes)
