"""The one small message per rank at the end of a synchronised backward, once all buckets were reduced.

What its flags lead to is decided in `reducer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.collectives import Collectives


@dataclass(frozen=True)
class Trailer:
    """What at least one rank says; equal on every rank."""

    used: np.ndarray[Any, Any]  # of each parameter, whether it got a gradient in this backward
    carried: np.ndarray[Any, Any]  # of each parameter, whether what was reduced before is added to the result
    late: list[int]  # buckets that changed after they were launched
    nonfinite: bool  # what was reduced held an infinity or a NaN


def exchange(
    ranks: Collectives,
    *,
    parameters: int,
    buckets: int,
    used: Iterable[int],
    carried: Iterable[int],
    late: Iterable[int],
    nonfinite: bool,
) -> Trailer:
    """Returns what any rank says; a collective.

    Args:
        parameters: how many there are, and
        buckets: of those; alike on all ranks. The others are this rank's.
    """
    flags = np.zeros(2 * parameters + buckets + 1, np.uint8)
    flags[list(used)] = 1
    flags[[parameters + index for index in carried]] = 1
    flags[[2 * parameters + number for number in late]] = 1
    flags[-1] = nonfinite
    mine = np.packbits(flags)
    agreed = np.empty_like(mine)
    sequence = ranks.topology.begin()
    ranks.topology.wait(ranks.start_words_or(mine, agreed), "the end of a synchronised step", sequence)
    flags = np.unpackbits(agreed, count=flags.size)
    late = [int(number) for number in np.flatnonzero(flags[2 * parameters : -1])]
    return Trailer(flags[:parameters], flags[parameters : 2 * parameters], late, bool(flags[-1]))
