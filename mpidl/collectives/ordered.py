"""Minimum and maximum of floating numbers by MPI, which does not say what becomes of a NaN, nor of -0 beside 0.

Numbers travel as integers of the same order, in which a NaN is beyond every number: a NaN on any rank is the result on
all ranks, as in numpy, and of two zeros the minimum is -0 and the maximum 0. The kernels in csrc do the same for NaNs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from mpidl.arrays import devices, view
from mpidl.arrays.view import ArrayView
from mpidl.collectives.staging import carry_out

_KEYS = {"float32": ("int32", 31), "float64": ("int64", 63)}  # and how far the sign bit is from the lowest


def by_mpi(
    start: Callable[..., list[Any]], send: ArrayView, receive: ArrayView | None, op: str, *rest: Any
) -> Generator[Any, None, None]:
    """Carries out a reduction of dense memory by MPI.

    Args:
        start: of `Topology`.
        send: what this rank gives.
        receive: for the result; apart from `send`. None: this rank gets none.
        op: "sum" and the like.
        rest: further arguments of `start`.
    """
    if op not in ("min", "max") or send.dtype not in _KEYS or not send.count:
        yield from carry_out(start, send, receive, op, *rest)
        return
    if send.device != "cpu":  # MPI could take it there, and this code could not
        device = devices.of(send)
        host, copied = device.fetch(send)
        yield copied
        result = None if receive is None else device.like(receive, receive.shape)
        yield from by_mpi(start, host, result, op, *rest)
        if receive is not None and result is not None:
            device.deliver(result, receive)
        return
    dtype, _ = _KEYS[send.dtype]
    keys = _keys(send, largest=op == "max")
    ordered = None if receive is None else receive._replace(dtype=dtype)
    yield from carry_out(start, view.view(keys), ordered, op, *rest)
    if receive is not None:
        numbers = _integers(receive)
        numbers ^= (numbers >> _KEYS[receive.dtype][1]) & _mask(receive)


def _keys(array: ArrayView, *, largest: bool) -> Any:
    """Returns integers in the order of an array's numbers; a NaN is the largest of all integers, or the smallest."""
    bits, values = _integers(array), view.as_numpy(array)
    keys = bits ^ ((bits >> _KEYS[array.dtype][1]) & _mask(array))
    keys[np.isnan(values)] = _mask(array) if largest else -_mask(array) - 1
    return keys


def _mask(array: ArrayView) -> int:
    """Returns all bits but the sign: to turn these over puts negative numbers in order, and back into numbers."""
    return (1 << _KEYS[array.dtype][1]) - 1


def _integers(array: ArrayView) -> Any:
    """Returns a dense array's memory as a flat array of integers."""
    return view.as_numpy(array).view(_KEYS[array.dtype][0])
