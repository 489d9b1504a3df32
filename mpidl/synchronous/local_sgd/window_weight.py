"""The weight of one rank in a mean: one like all, or the samples of the rank's steps, as in federated averaging."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidl.errors import ArgumentError
from mpidl.mpi.agreement import disagreement

_EQUAL, _GIVEN, _MIXED = range(3)
_KINDS = {_EQUAL: "equal weights", _GIVEN: "samples(k)", _MIXED: "samples(k) in some of its steps"}


class WindowWeight:
    """Adds up the samples of one rank's steps.

    Attributes:
        state: number of steps, number of steps whose samples were given, sum of those samples.
    """

    def __init__(self, *counts: int | None) -> None:
        self.state = [0, 0, 0]
        for count in counts:
            self.add(count)

    def add(self, count: int | None) -> None:
        """Adds one step; None: its number of samples is not known."""
        self.state[0] += 1
        self.state[1] += count is not None
        self.state[2] += count or 0

    def words(self) -> list[int]:
        """Returns the kind of weight and the weight."""
        steps, given, total = self.state
        return [_EQUAL, 1] if not given else [_GIVEN if given == steps else _MIXED, total]


def shares(kinds: Any, weights: Any, present: Any) -> np.ndarray[Any, Any]:
    """Returns the weight of every rank; equal on every rank.

    Args:
        kinds, weights: the words of all ranks.
        present: whether a rank has taken steps; the weights of other ranks are 0.

    Raises:
        ArgumentError: some ranks gave samples and others did not, or a rank gave them for some of its steps only.
    """
    found = {int(kind) for kind in kinds[present]}
    if len(found) > 1 or _MIXED in found:
        texts = [_KINDS[int(kind)] if here else "no steps" for kind, here in zip(kinds, present, strict=True)]
        raise ArgumentError(
            f"weights differ in kind: {disagreement(texts)}; use samples(k) in all steps of all ranks or in none"
        )
    return np.where(present, weights, 0)
