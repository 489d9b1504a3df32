"""What the algorithms refuse of their arguments, found before anything is sent."""

from __future__ import annotations

import math
from typing import Any

import torch

from mpidl.errors import ArgumentError


def whole(name: str, value: object, *, least: int) -> ArgumentError | None:
    """Returns what is wrong with a whole number."""
    if type(value) is int and value >= least:
        return None
    return ArgumentError(f"{name}={value!r}; expected a whole number, {least} or more")


def positive(name: str, value: object) -> ArgumentError | None:
    """Returns what is wrong with a number that must be above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return None
    return ArgumentError(f"{name}={value!r}; expected a number above 0")


def not_negative(name: str, value: object) -> ArgumentError | None:
    """Returns what is wrong with a number that must be 0 or more."""
    return None if type(value) in (int, float) and value == 0 else positive(name, value)


def plain_sgd(optimizer: Any, rule: str, *, unused: tuple[str, ...] = ()) -> ArgumentError | None:
    """Returns what is wrong with the optimiser of a rule that works on gradients.

    Args:
        optimizer: must be torch.optim.SGD itself, whose steps are known.
        rule: for messages.
        unused: hyperparameters of SGD that the rule has no meaning for; they must be 0 or False.
    """
    if type(optimizer) is not torch.optim.SGD:
        return ArgumentError(
            f"optimizer is a {type(optimizer).__name__}; {rule} works on gradients and reads what SGD is made of: "
            "expected a torch.optim.SGD"
        )
    for group in optimizer.param_groups:
        for key in unused:
            if group[key]:
                return ArgumentError(f"the optimizer's {key} is {group[key]!r}; {rule} has no use for it: leave it out")
    return None
