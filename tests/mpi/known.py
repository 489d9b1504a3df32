"""Inputs that differ by rank and reduce exactly, and what they must reduce to, computed by numpy from all inputs.

No MPI here: every rank can make every other rank's input.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpidl.mpi import shared_memory

OPS = ("sum", "mean", "min", "max", "prod")
FLOATING = ("float16", "bfloat16", "float32", "float64")
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
COMPLEX = ("complex64", "complex128")
REDUCIBLE = FLOATING + WHOLE + COMPLEX
# Kind and dtype of every array that can be moved.
ARRAYS = [
    (kind, dtype)
    for kind in ("numpy", "torch")
    for dtype in (*REDUCIBLE, "bool")
    if not (kind == "numpy" and dtype == "bfloat16")
]


def defined(op: str, dtype: str) -> bool:
    """Whether `dtype` can be reduced by `op`."""
    if dtype in COMPLEX:
        return op not in ("min", "max")
    return op != "mean" or dtype in FLOATING


def values(rank: int, count: int, dtype: str, op: str = "sum") -> np.ndarray[Any, Any]:
    """Returns rank's input in float64 or complex128: small integers, for products ones, twos and units."""
    i = np.arange(count)
    if op == "prod":
        return 1j ** ((rank + i) % 4) if dtype in COMPLEX else 1.0 + (rank + i) % 2
    if dtype == "bool":
        return ((rank + i) % 3 == 0).astype(np.float64)
    real = (3 * rank + 2 * i + rank * i) % 7 - (0.0 if dtype.startswith("uint") else 3.0)
    return real + 1j * ((rank + 2 * i) % 5) if dtype in COMPLEX else real


def make(kind: str, dtype: str, wide: np.ndarray[Any, Any]) -> Any:
    """Returns an array of `kind` and `dtype` with the given values."""
    if kind == "numpy":
        return wide.astype(dtype)
    if dtype == "bfloat16":
        return torch.from_numpy(wide.astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(wide.astype(dtype))


def own(kind: str, dtype: str, rank: int, count: int, op: str = "sum") -> Any:
    """Returns rank's input as an array."""
    return make(kind, dtype, values(rank, count, dtype, op))


def reduced(op: str, inputs: list[np.ndarray[Any, Any]], kind: str, dtype: str) -> Any:
    """Returns what `inputs` must reduce to; a mean is divided in the dtype in which it is summed."""
    stacked = np.stack(inputs)
    if op in ("min", "max", "prod"):
        return make(kind, dtype, getattr(stacked, op)(axis=0))
    total = stacked.sum(axis=0)
    if op == "mean":
        accumulator = "float32" if dtype in ("float16", "bfloat16") else dtype
        total = total.astype(accumulator) / np.asarray(len(inputs), accumulator)
    return make(kind, dtype, total)


def assert_same(found: Any, expected: Any) -> None:
    """Asserts same kind, dtype, shape and bits."""
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert tuple(found.shape) == tuple(expected.shape)
    if isinstance(found, torch.Tensor):
        assert not found.requires_grad
        assert torch.equal(found, expected), (found, expected)
    else:
        assert np.array_equal(found, expected), (found, expected)


def named_segments(comm: Any) -> set[Path]:
    """The named segments of shared memory that these ranks have made, not those of other jobs; a collective."""
    makers = comm.allgather(np.array([os.getpid()]))[:, 0].tolist()
    return {path for maker in makers for path in shared_memory.FOLDER.glob(f"mpidl-{maker}-*")}
