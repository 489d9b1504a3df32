"""Hyperparameters, declared once: the signature of a constructor has name, default, and in its annotation the check.

    gamma: PositiveFloat = 1e-4

From it follow the refusal of values that cannot work (`problem`), what ranks compare (`given`, as the constructor hands
it on) and what `mpidl train --set` takes (`mpidl.training.algorithms` reads the same line). The line that explains the
hyperparameter is its entry in the docstring.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import torch

from mpidl.errors import ArgumentError

Check = Callable[[str, object], "ArgumentError | None"]


def positive(name: str, value: object) -> ArgumentError | None:
    """Returns an error unless the value is a finite number above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return None
    return ArgumentError(f"{name}={value!r}; expected a number above 0")


def not_negative(name: str, value: object) -> ArgumentError | None:
    """Returns an error unless the value is a finite number, 0 or more."""
    return None if type(value) in (int, float) and value == 0 else positive(name, value)


def whole(name: str, value: object, *, least: int) -> ArgumentError | None:
    """Returns an error unless the value is a whole number, `least` or more."""
    if type(value) is int and value >= least:
        return None
    return ArgumentError(f"{name}={value!r}; expected a whole number, {least} or more")


def whole_from_1(name: str, value: object) -> ArgumentError | None:
    """Returns an error unless the value is a whole number, 1 or more."""
    return whole(name, value, least=1)


def whole_from_0(name: str, value: object) -> ArgumentError | None:
    """Returns an error unless the value is a whole number, 0 or more."""
    return whole(name, value, least=0)


PositiveFloat = Annotated[float, positive]
NonNegativeFloat = Annotated[float, not_negative]
PositiveInt = Annotated[int, whole_from_1]
NonNegativeInt = Annotated[int, whole_from_0]


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a constructor, to be handed on to that of its base.

    Args:
        arguments: the constructor's `locals()`, before it has other local variables.
    """
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__", "optimizer", "model")}


def problem(kind: type, arguments: Mapping[str, object]) -> ArgumentError | None:
    """Returns what is wrong with the first hyperparameter that cannot work.

    Args:
        kind: the class whose constructor declares the hyperparameters.
        arguments: by name; None passes where the annotation allows it.
    """
    found = (check(name, arguments[name]) for name, check in checks(kind).items() if name in arguments)
    return next((error for error in found if error is not None), None)


def checks(kind: type) -> dict[str, Check]:
    """Returns the check of each checked parameter of a class's constructor, by name, in the order of its signature."""
    hints = get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]
    found = {name: _check_of(hints.get(name)) for name in inspect.signature(kind).parameters}
    return {name: check for name, check in found.items() if check is not None}


def _check_of(hint: Any) -> Check | None:
    if get_origin(hint) is Annotated:
        check: Check = get_args(hint)[1]
        return check
    if get_origin(hint) in (Union, types.UnionType):
        for one in get_args(hint):
            check_one = _check_of(one)
            if check_one is not None:
                return lambda name, value: None if value is None else check_one(name, value)
    return None


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
