"""The recycled result buffer: memory for results that become tensors, used again once no tensor refers to it.

A user who keeps such a tensor, or a view of the tensor, keeps its values: the next result then lies in other memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from mpidl.arrays import view as arrays


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

    def as_tensor(self) -> torch.Tensor:
        """Returns the result in `array` as a flat tensor, for the caller to make views of; once per result."""
        alias = self.array.view()
        self._tensor = weakref.ref(alias)  # the tensor's storage holds `alias`, and each view holds the storage
        return torch.from_numpy(alias)

    def recycle(self) -> None:
        """Makes `array` memory to which no tensor refers: the same memory, the one before, or new memory."""
        if self._tensor is None or self._tensor() is None:
            return
        before, self._other = self._other, (self.array, self._tensor)
        free = before is not None and (before[1] is None or before[1]() is None)
        self.array = before[0] if before is not None and free else np.empty_like(self.array)
        self.view = arrays.view(self.array)
        self._tensor = None
