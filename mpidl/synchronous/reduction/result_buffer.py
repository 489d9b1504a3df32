"""The recycled result buffer: memory for results that become tensors, used again once no tensor refers to it.

A user who keeps such a tensor, or a view of the tensor, keeps its values: the next result then lies in other memory.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpidl.arrays import view as arrays


@dataclass(frozen=True)
class Lent:
    """Memory of a result to which tensors refer."""

    alias: Any
    dtype: np.dtype[Any]

    def tensor(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> torch.Tensor:
        """Returns a part of the result as a tensor with a storage of its own: who saves the tensor saves no more.

        Args:
            shape: of the tensor.
            strides: of its dimensions, in bytes.
            offset: of its first element.
        """
        return torch.from_numpy(np.ndarray(shape, self.dtype, self.alias, offset * self.dtype.itemsize, strides))


class ResultBuffer:
    """Flat memory for one result at a time, replaced where a tensor still refers to the last result.

    Args:
        count: elements of a result.
        dtype: dtype of a result.

    Attributes:
        array: the memory of the next result, or of the last one.
        view: the same memory as an `ArrayView`.
    """

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        self.array: np.ndarray[Any, Any] = np.empty(count, dtype)
        self.view = arrays.view(self.array)
        self._tensor: weakref.ref[Any] | None = None
        # The memory of an earlier result to which a tensor still referred when `recycle` last looked.
        self._other: tuple[np.ndarray[Any, Any], weakref.ref[Any] | None] | None = None

    def lend(self) -> Lent:
        """Returns the memory of the result in `array`, for tensors to be made of; once per result."""
        alias = (ctypes.c_char * self.array.nbytes).from_buffer(self.array.data)
        self._tensor = weakref.ref(alias)  # each tensor's storage holds `alias`, and each view holds the storage
        return Lent(alias, self.array.dtype)

    def recycle(self) -> None:
        """Makes `array` memory to which no tensor refers: the same memory, the one before, or new memory."""
        if self._tensor is None or self._tensor() is None:
            return
        before, self._other = self._other, (self.array, self._tensor)
        free = before is not None and (before[1] is None or before[1]() is None)
        self.array = before[0] if before is not None and free else np.empty_like(self.array)
        self.view = arrays.view(self.array)
        self._tensor = None
