"""Checks of the algorithms' arguments, made before the first message; each returns an error or None."""

from __future__ import annotations

import math
from typing import Any

import torch

from mpidl.errors import ArgumentError


def whole(name: str, value: object, *, least: int) -> ArgumentError | None:
    """Returns an error unless the value is a whole number, `least` or more."""
    if type(value) is int and value >= least:
        return None
    return ArgumentError(f"{name}={value!r}; expected a whole number, {least} or more")


def positive(name: str, value: object) -> ArgumentError | None:
    """Returns an error unless the value is a finite number above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return None
    return ArgumentError(f"{name}={value!r}; expected a number above 0")


def not_negative(name: str, value: object) -> ArgumentError | None:
    """Returns an error unless the value is a finite number, 0 or more."""
    return None if type(value) in (int, float) and value == 0 else positive(name, value)


def plain_sgd(optimizer: Any, rule: str, *, unused: tuple[str, ...] = ()) -> ArgumentError | None:
    """Returns an error unless the optimiser is torch.optim.SGD itself, whose steps a rule on gradients knows.

    Args:
        optimizer: the user's.
        rule: name of the rule, for messages.
        unused: hyperparameters of SGD for which the rule has no meaning; they must be 0 or False.
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
