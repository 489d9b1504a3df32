"""The one small message per rank at the end of a synchronised backward, once all buckets were reduced.

What its flags lead to is decided in `reducer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
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


class StepTrailer:
    """Exchanges the flags of one optimiser's ranks, once per backward.

    Python runs slowly when backward has just filled the caches: where every rank says the usual, nothing is unpacked.

    Args:
        ranks: among whom.
        parameters: how many there are, and
        buckets: of those; alike on all ranks.
    """

    def __init__(self, ranks: Collectives, parameters: int, buckets: int) -> None:
        self._ranks, self._parameters, self._buckets = ranks, parameters, buckets
        self._all_used = self._packed(range(parameters), (), (), False)
        self._everyone = np.empty((ranks.topology.size, self._all_used.size), np.uint8)
        self._usual_bytes = self._all_used.tobytes() * ranks.topology.size
        self._usual = self._unpacked(self._all_used)

    def exchange(self, used: Set[int], carried: Iterable[int], late: Set[int], nonfinite: bool) -> Trailer:
        """Returns what any rank says; a collective."""
        carried = tuple(carried)
        usual = len(used) == self._parameters and not (carried or late or nonfinite)
        mine = self._all_used if usual else self._packed(used, carried, late, nonfinite)
        ranks = self._ranks.topology
        sequence = ranks.begin()
        request = self._ranks.start_words_gather(mine, self._everyone)
        ranks.wait(request, "the end of a synchronised step", sequence)
        if self._everyone.tobytes() == self._usual_bytes:
            return self._usual
        return self._unpacked(np.bitwise_or.reduce(self._everyone, axis=0))

    def _packed(
        self, used: Iterable[int], carried: Iterable[int], late: Iterable[int], nonfinite: bool
    ) -> np.ndarray[Any, Any]:
        flags = np.zeros(2 * self._parameters + self._buckets + 1, np.uint8)
        flags[list(used)] = 1
        flags[[self._parameters + index for index in carried]] = 1
        flags[[2 * self._parameters + number for number in late]] = 1
        flags[-1] = nonfinite
        return np.packbits(flags)

    def _unpacked(self, agreed: np.ndarray[Any, Any]) -> Trailer:
        count = self._parameters
        flags = np.unpackbits(agreed, count=2 * count + self._buckets + 1)
        late = [int(number) for number in np.flatnonzero(flags[2 * count : -1])]
        return Trailer(flags[:count], flags[count : 2 * count], late, bool(flags[-1]))
