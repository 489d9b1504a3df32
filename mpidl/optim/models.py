"""What an optimiser is given as its model: one module, or a list of modules and loose parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpidl.errors import ArgumentError

Model = torch.nn.Module | Sequence[torch.nn.Module | torch.nn.Parameter]
_EXPECTED = "expected a torch.nn.Module, or a list of modules and parameters"


class Together(torch.nn.Module):
    """Several modules and loose parameters as one module; a name begins with the place in the list ("1.weight").

    The modules stay as they are: they know nothing of this one, and get no hook from it.
    """

    def __init__(self, members: list[torch.nn.Module | torch.nn.Parameter]) -> None:
        super().__init__()
        for place, member in enumerate(members):
            if isinstance(member, torch.nn.Module):
                self.add_module(str(place), member)
            else:
                self.register_parameter(str(place), member)


def problem(model: Any) -> ArgumentError | None:
    """Returns what is wrong with the model that an optimiser was given."""
    if isinstance(model, torch.nn.Module):
        return None
    if not isinstance(model, list | tuple):
        return ArgumentError(f"model is a {type(model).__name__}; {_EXPECTED}")
    if not model:
        return ArgumentError(f"model is an empty {type(model).__name__}; {_EXPECTED}")
    for place, member in enumerate(model):
        if not isinstance(member, torch.nn.Module | torch.nn.Parameter):
            return ArgumentError(
                f"model[{place}] is a {type(member).__name__}; expected a torch.nn.Module or a torch.nn.Parameter"
            )
    return None


def together(model: Any) -> Any:
    """Returns a module as it is, and a list that has no `problem` as one module."""
    if isinstance(model, list | tuple) and problem(model) is None:
        return Together(list(model))
    return model


def called(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the modules that the user calls and that take hooks: the model, or the modules of the list, each once.

    A ScriptModule takes none. The hooks on its parameters then do all the work.
    """
    found = list(model.children()) if isinstance(model, Together) else [model]
    return [module for module in found if not isinstance(module, torch.jit.ScriptModule)]
