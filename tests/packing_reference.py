"""What packing means, in numpy: slow, plain, used by nothing silently; the tests hold the extension to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.packing import Packed

_Flat = np.ndarray[Any, Any]


def reference_pack(tensors: Sequence[object], out: object, *, scale: float = 1.0) -> Packed:
    """`mpidl.pack` for arguments that `mpidl.pack` takes."""
    target = view.view(out, "out")
    start, total, finite = 0, 0.0, True
    for tensor in tensors:
        source = view.view(view.contiguous(tensor))
        stop = start + source.count
        squares, fine = _move(source, slice(None), target, slice(start, stop), scale)
        start, total, finite = stop, total + squares, finite and fine
    return Packed(start, total, finite)


def reference_unpack(flat: object, tensors: Sequence[object], *, scale: float = 1.0) -> Packed:
    """`mpidl.unpack` for arguments that `mpidl.unpack` takes."""
    source = view.view(flat, "flat")
    start, total, finite = 0, 0.0, True
    for tensor in tensors:
        temporary = view.empty_like(tensor)
        target = view.view(temporary)
        stop = start + target.count
        squares, fine = _move(source, slice(start, stop), target, slice(None), scale)
        view.copy_into(tensor, temporary)
        start, total, finite = stop, total + squares, finite and fine
    return Packed(start, total, finite)


def _move(
    source: view.ArrayView, here: slice, target: view.ArrayView, there: slice, scale: float
) -> tuple[float, bool]:
    memory = view.as_numpy(source)[here]
    written = memory
    with np.errstate(all="ignore"):  # an overflow is reported by the finite flag, a NaN is data
        if scale != 1.0 or source.dtype != target.dtype:
            values = _decoded(memory, source.dtype)
            written = _encoded(values * values.dtype.type(scale), target.dtype)
        view.as_numpy(target)[there] = written
        wide = _decoded(written, target.dtype).astype(np.float64)
        return float(np.sum(wide * wide)), bool(np.isfinite(wide).all())


def _decoded(memory: _Flat, dtype: str) -> _Flat:
    """In the dtype of the arithmetic: float32 for the half types."""
    if dtype == "bfloat16":
        return (memory.astype(np.uint32) << 16).view(np.float32)
    return memory.astype(np.float32) if dtype == "float16" else memory


def _encoded(values: _Flat, dtype: str) -> _Flat:
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits: _Flat = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))  # to nearest, ties to even
    kept: _Flat = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded)
    return (kept >> 16).astype(np.uint16)
