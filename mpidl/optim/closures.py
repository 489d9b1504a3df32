"""Closures: which optimisers evaluate one once, and what is refused for the others.

`step(closure)` of torch evaluates the closure (zero_grad, forward, backward) inside the step. An optimiser that
evaluates it once takes the same step as after a backward of the user's own. One that evaluates it several times moves
the parameters in between, and may decide by the loss how often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpidl.errors import ArgumentError

Closure = Callable[[], Any]

_ONCE = frozenset(
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.LBFGS
)


def evaluates_once(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimiser is known to evaluate its closure once, at the beginning of its step."""
    return type(optimizer) in _ONCE


def refuse_argument(closure: Any) -> None:
    """Refuses what is given to `step` and is no closure.

    Raises:
        ArgumentError: it cannot be called.
    """
    if closure is not None and not callable(closure):
        raise ArgumentError(
            f"step({type(closure).__name__}): expected a closure, or nothing: step() takes no loss, call "
            "loss.backward() before it"
        )


def curvature_problem(optimizer: Any, name: str) -> ArgumentError | None:
    """Returns an error for LBFGS in a class whose exchanges move the parameters between two steps.

    Args:
        optimizer: the user's.
        name: of the class, for messages.
    """
    if not isinstance(optimizer, torch.optim.LBFGS):
        return None
    return ArgumentError(
        f"optimizer is an {type(optimizer).__name__}, which takes the change of the gradient between two of its steps "
        f"for curvature; exchanges of mpidl.{name} move the parameters in between: use mpidl.Synchronous, or another "
        "optimizer"
    )


def evaluated(closure: Closure) -> Any:
    """Returns the closure's loss; gradients are made in it."""
    with torch.enable_grad():
        return closure()
