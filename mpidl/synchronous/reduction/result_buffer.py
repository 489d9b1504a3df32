"""Memory for results that are handed out as tensors, and is used again only when no tensor looks at it any more.

Whoever keeps such a tensor, or a view of it, keeps what it held: the next result then goes elsewhere.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch


class ResultBuffer:
    """Flat memory, made anew where the last result is still in use.

    Args:
        count: elements.
        dtype: their dtype.

    Attributes:
        now: where the next result goes, or the last one lies.
    """

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        self.now: np.ndarray[Any, Any] = np.empty(count, dtype)
        self._lent: weakref.ref[Any] | None = None
        # The memory of an earlier result, which was in use when it was last looked at.
        self._other: tuple[np.ndarray[Any, Any], weakref.ref[Any] | None] | None = None

    def lend(self) -> torch.Tensor:
        """Returns the result that lies in `now`, flat, for the caller to view parts of; once per result."""
        alias = self.now.view()
        self._lent = weakref.ref(alias)  # the tensor's storage holds this object, and each view the storage
        return torch.from_numpy(alias)

    def renew(self) -> None:
        """Makes `now` memory at which no tensor looks: the same, the one before, or new."""
        if not _in_use(self._lent):
            return
        before, self._other = self._other, (self.now, self._lent)
        free = before is not None and not _in_use(before[1])
        self.now = before[0] if before is not None and free else np.empty_like(self.now)
        self._lent = None


def _in_use(lent: weakref.ref[Any] | None) -> bool:
    return lent is not None and lent() is not None
