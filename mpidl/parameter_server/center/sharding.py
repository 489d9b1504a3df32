"""Which rank holds which elements of the flat center variable; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_GAP = 4096  # elements that are rather passed over than left out
_ALIGNMENT = 64  # elements; a shard begins on a cache line and pieces of it on vector boundaries


@dataclass(frozen=True)
class Shard:
    """A contiguous part of the center variable: elements [start, start + count) lie on rank `owner`."""

    owner: int
    start: int
    count: int


def shard(count: int, owners: int, first: int = 0) -> tuple[Shard, ...]:
    """Cuts `count` elements into one shard per owner, in order, equal but for rounding; late ones may be empty.

    The owners are the ranks from `first` on.
    """
    size = -(-count // owners)
    size = -(-size // _ALIGNMENT) * _ALIGNMENT
    starts = [min(count, owner * size) for owner in range(owners + 1)]
    return tuple(Shard(first + i, starts[i], starts[i + 1] - starts[i]) for i in range(owners))


def runs(found: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Ranges that hold all of the ascending indices, and of the rest only small gaps."""
    if found.size:
        cuts = np.flatnonzero(np.diff(found) > _GAP)
        firsts, lasts = np.append(0, cuts + 1), np.append(cuts, found.size - 1)
        yield from ((int(found[first]), int(found[last]) + 1) for first, last in zip(firsts, lasts, strict=True))
