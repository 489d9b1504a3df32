"""The one small message per rank at the end of a synchronised backward, sent once all buckets were reduced.

`Round` decides what follows from the flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.collectives import Collectives
from mpidl.optim.state import agree


@dataclass(frozen=True)
class Trailer:
    """What at least one rank says; equal on every rank."""

    used: Sequence[bool]  # of each parameter, whether the parameter got a gradient in this backward
    carried: Sequence[bool]  # of each parameter, whether its earlier reduced gradient is added to the result
    late: list[int]  # numbers of the buckets that changed after their launch
    nonfinite: bool  # some gradient that was reduced held an infinity or a NaN
    refused: bool  # some gradient cannot be reduced


class StepTrailer:
    """Exchanges the flags of one optimiser's ranks, once per backward.

    Python runs slowly just after backward, which has filled the caches: where every rank sends the usual flags (all
    parameters used, nothing carried, late or non-finite), no flag is unpacked.

    Args:
        collectives: of the optimiser's ranks.
        parameters: number of parameters, equal on all ranks.
        buckets: number of buckets, equal on all ranks.
    """

    def __init__(self, collectives: Collectives, parameters: int, buckets: int) -> None:
        self._collectives, self._parameters, self._buckets = collectives, parameters, buckets
        self._all_used = self._packed(range(parameters), (), ())
        self._everyone = np.empty((collectives.topology.size, self._all_used.size), np.uint8)
        self._usual_bytes = self._all_used.tobytes() * collectives.topology.size
        self._usual = self._unpacked(self._all_used)

    def exchange(
        self, used: Set[int], carried: Iterable[int], late: Set[int], *, nonfinite: bool, refused: bool
    ) -> Trailer:
        """Returns what at least one rank says; a collective.

        Args:
            used: indices of the parameters that this rank used.
            carried: indices of the parameters whose earlier reduced gradient this rank adds.
            late: numbers of the buckets that changed on this rank after their launch.
            nonfinite: whether a gradient of this rank held an infinity or a NaN.
            refused: whether a gradient of this rank cannot be reduced.
        """
        carried = tuple(carried)
        usual = len(used) == self._parameters and not (carried or late or nonfinite or refused)
        mine = self._all_used if usual else self._packed(used, carried, late, nonfinite, refused)
        ranks = self._collectives.topology
        sequence = ranks.begin()
        request = self._collectives.start_words_gather(mine, self._everyone)
        ranks.wait(request, "the end of a synchronised step", sequence)
        if self._everyone.tobytes() == self._usual_bytes:
            return self._usual
        return self._unpacked(np.bitwise_or.reduce(self._everyone, axis=0))

    def refuse(self, error: Exception | None) -> None:
        """Raises, on every rank, that some gradient cannot be reduced; a collective.

        Args:
            error: what is wrong with this rank's gradient; None: nothing.
        """
        agree(self._collectives.topology, "the reduction of gradients", {}, error)

    def _packed(
        self, used: Iterable[int], carried: Iterable[int], late: Iterable[int], *last: bool
    ) -> np.ndarray[Any, Any]:
        flags = np.zeros(2 * self._parameters + self._buckets + 2, np.uint8)
        flags[list(used)] = 1
        flags[[self._parameters + index for index in carried]] = 1
        flags[[2 * self._parameters + number for number in late]] = 1
        flags[-2:] = last or False
        return np.packbits(flags)

    def _unpacked(self, agreed: np.ndarray[Any, Any]) -> Trailer:
        count = self._parameters
        flags = np.unpackbits(agreed, count=2 * count + self._buckets + 2).astype(bool).tolist()
        late = [number for number, flag in enumerate(flags[2 * count : -2]) if flag]
        return Trailer(flags[:count], flags[count : 2 * count], late, *flags[-2:])
