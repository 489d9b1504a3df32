"""The loss of a closure whose optimiser decides by it (LBFGS): in every evaluation the mean over all ranks.

With equal losses and equal gradients all ranks take the same decisions, and evaluate their closures equally often.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpidl.errors import ArgumentError
from mpidl.mpi.agreement import disagreement
from mpidl.mpi.topology import Topology
from mpidl.optim import closures
from mpidl.optim.closures import Closure
from mpidl.synchronous.reduction.header import EVALUATING
from mpidl.synchronous.reduction.reducer import Reducer

# What a closure returned: the dtypes in the order of their precision, so that the largest number is the coarsest.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ABSENT, _NONE, _NO_NUMBER, _SEVERAL_WEIGHTS = -1, -2, -3, -4
_FOUND = {
    _ABSENT: "no samples",
    _NONE: "None",
    _NO_NUMBER: "something that is not one real number",
    _SEVERAL_WEIGHTS: "a loss of several backwards with different samples(k)",
}


class MeanLoss:
    """Evaluates closures on all ranks together.

    Args:
        reducer: reduces the gradients of each evaluation.
        ranks: all ranks.
        needed: whether the optimiser fails without a loss; else no closure need return one.
    """

    def __init__(self, reducer: Reducer, ranks: Topology, *, needed: bool) -> None:
        self._reducer, self._ranks, self._needed = reducer, ranks, needed

    def evaluated(self, closure: Closure) -> Any:
        """Evaluates the closure; returns the mean of all ranks' losses, weighed as their gradients; a collective.

        Raises:
            ArgumentError: a closure did not return a number, or its backwards had different weights; alike on all
                ranks.
        """
        self._reducer.weights.clear()
        loss = closures.evaluated(closure)
        self._reducer.reduce_missing("step")
        weight = self._reducer.weight
        kind, value = _described(loss)
        if len(self._reducer.weights) > 1:
            kind = _SEVERAL_WEIGHTS
        elif self._reducer.weights:
            (weight,) = self._reducer.weights
        self._reducer.announce(EVALUATING)
        mean = self._exchange(kind if weight or kind == _SEVERAL_WEIGHTS else _ABSENT, value, weight)
        if mean is None or not isinstance(loss, torch.Tensor):
            return mean
        return torch.full_like(loss.detach(), mean)

    def answer(self) -> None:
        """Takes part in an evaluation of the other ranks, while this rank is in `finish()`."""
        self._exchange(_ABSENT, 0.0, 0)

    def _exchange(self, kind: int, value: float, weight: int) -> float | None:
        everyone = self._ranks.gather_words(np.array([kind, weight, value], np.float64), "the mean of the loss")
        kinds = [int(each) for each in everyone[:, 0]]
        present = {each for each in kinds if each != _ABSENT}
        if present == {_NONE} and not self._needed:
            return None
        if min(kinds) < _ABSENT:
            texts = [_FOUND.get(each, "a loss") for each in kinds]
            raise ArgumentError(
                f"step: the closure returned {disagreement(texts)}; return the loss whose backward it ran, one number "
                "on every rank: the optimizer decides by its mean"
            )
        if not present:
            raise ArgumentError("samples: all ranks gave 0 samples, so there is no mean to take")
        total = sum(row[1] for row in everyone.tolist() if row[0] != _ABSENT)
        mean = sum(row[2] * (row[1] / total) for row in everyone.tolist() if row[0] != _ABSENT)
        return float(torch.tensor(mean, dtype=torch.float64).to(_DTYPES[max(present)]))


def _described(loss: Any) -> tuple[int, float]:
    """Returns what kind of loss a closure returned, and its value."""
    if loss is None:
        return _NONE, 0.0
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1 or loss.dtype not in _DTYPES:
            return _NO_NUMBER, 0.0
        return _DTYPES.index(loss.dtype), float(loss.detach())
    if isinstance(loss, int | float | np.floating | np.integer):
        return 0, float(loss)
    return _NO_NUMBER, 0.0
