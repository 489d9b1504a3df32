"""The signature of an optimiser's parameters: what each of them is, looked at before every step, so that a model that
has changed is seen before any address of its memory is used.

A look costs about half a microsecond per parameter. What has changed is followed where that is possible: shapes, dtypes
and devices. Everything else has the number of an error, which every rank can word.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

import torch

from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.errors import ArgumentError, DtypeError, ExtensionError, MpidlError
from mpidl.optim.state import Named, dtype_name, memory_order

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")
_GROUP = 1 << 20  # more parameters than a group has
_DTYPE, _DEVICE, _REPLACED, _THAWED, _FIXED, _GRADIENT, _ADDED = range(7)
_ERRORS: dict[int, tuple[type[MpidlError], str]] = {
    _DTYPE: (
        DtypeError,
        "parameter {name}, or its gradient, has been cast to a dtype in which gradients cannot be reduced; expected "
        "float16, bfloat16, float32 or float64",
    ),
    _DEVICE: (
        DtypeError,
        "parameter {name} has been moved to a device that cannot be used, or on which the other parameters are not: "
        "move the whole model",
    ),
    _REPLACED: (
        ArgumentError,
        "parameter {name} has left the model, which now has another object in its place or none, and the optimizer "
        "would go on with the old one: write the new values into it (`p.data.copy_(...)`), or call finish(), build an "
        "optimizer from the changed model and wrap it",
    ),
    _THAWED: (
        ArgumentError,
        "parameter {name} was frozen when the optimizer was wrapped and now requires gradients, which would not be "
        "reduced: call finish(), and wrap the optimizer again after such a change",
    ),
    _FIXED: (
        ArgumentError,
        "parameter {name} has got another shape, dtype, device or dtype of its gradient: with shard=True make such "
        "changes before mpidl.Synchronous or after its finish()",
    ),
    _GRADIENT: (
        DtypeError,
        "the gradient of parameter {name} is sparse, or has not the shape, the dtype and the device that are expected "
        "of it: set p.grad to a dense tensor like the parameter",
    ),
    _ADDED: (
        ArgumentError,
        "param_groups[{group}]['params'][{place}] has been added since the optimizer was wrapped, and its gradient "
        "would not be reduced: call finish(), and wrap the optimizer again after such a change",
    ),
}


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the gradients that backward gives a parameter."""
    wanted = parameter.grad_dtype if _HAS_GRAD_DTYPE else None
    return parameter.dtype if wanted is None else wanted


def facts_of(on_cpu: bool, *, of_gradient: bool = False) -> Callable[[Any], tuple[Any, ...]]:
    """Returns a function that returns what has to stay as it is of a tensor, fast.

    Args:
        on_cpu: whether the tensors are expected on the cpu, where it is enough to see that they are.
        of_gradient: the tensor is a gradient, not a parameter.
    """
    place = "is_cpu" if on_cpu else "device"
    if of_gradient:
        return attrgetter("shape", "dtype", place, "layout")
    return attrgetter("shape", "dtype", place, *(["grad_dtype"] if _HAS_GRAD_DTYPE else []))


def registered_in(module: torch.nn.Module) -> dict[str, Any]:
    """Returns where a module itself keeps its parameters; of a ScriptModule, which keeps them in C++, a copy."""
    found: Any = module._parameters
    return found if isinstance(found, dict) else dict(found.items())


class Signature:
    """What an optimiser's parameters were when they were last looked at.

    Args:
        optimizer: holds the parameters.
        model: has the parameters.
        trained: the parameters whose gradients are exchanged, with their names; alike on all ranks.
        frozen: the other parameters of the optimiser.
        fixed: nothing about a parameter may change.

    Attributes:
        changed: whether a shape, a dtype or a device has changed since `settle`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, trained: Named, frozen: Named, *, fixed: bool
    ) -> None:
        self._optimizer, self._model, self._fixed = optimizer, model, fixed
        self._names, self._frozen = [name for name, _ in trained], frozen
        self._parameters = [p for _, p in trained]
        self._known = {id(p): name for name, p in [*trained, *frozen]}
        self._places: list[tuple[dict[str, Any], str]] = []
        self._find_places()
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self.settle()

    def settle(self) -> None:
        """Takes the parameters as they are now for what they should be."""
        self._facts_of = facts_of(self._parameters[0].is_cpu)
        self._facts = list(map(self._facts_of, self._parameters))
        self.changed = False

    def check(self, *, finishing: bool) -> int:
        """Returns 0, or the number of an error, which `describe_error` words on every rank; sets `changed`.

        Args:
            finishing: only shapes, dtypes and devices matter any more.
        """
        if list(map(self._facts_of, self._parameters)) != self._facts:
            error = self._check_facts()
            if error:
                return error
            self.changed = True
        if finishing:
            return 0
        here = [registered.get(name) for registered, name in self._places]
        if not all(map(is_, here, self._parameters)) and not self._find_places():
            return self._replaced()
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups) or not all(map(_same, groups, self._groups)):
            error = self._check_groups()
            if error:
                return error
        for index, (_, parameter) in enumerate(self._frozen):
            if parameter.requires_grad:
                return _number(_THAWED, index)
        return 0

    def describe(self) -> dict[str, Any]:
        """Returns what must be alike on all ranks, as JSON-able items."""
        found: dict[str, Any] = {}
        for name, p in zip(self._names, self._parameters, strict=True):
            kinds = [dtype_name(p), str(gradient_dtype(p)).removeprefix("torch.")]
            found[f"parameter {name}"] = [list(p.shape), *kinds, list(memory_order(p))]
        for number, group in enumerate(self._groups):
            found[f"order of parameter group {number}"] = [self._known.get(id(p)) for p in group]
        return found

    @staticmethod
    def gradient_error(index: int) -> int:
        """Returns the number of the error that a parameter's gradient cannot be reduced."""
        return _number(_GRADIENT, index)

    def describe_error(self, number: int) -> MpidlError:
        """Returns the error of a number from `check` or `gradient_error`, found by any rank."""
        index, kind = divmod(number - 1, len(_ERRORS))
        error, text = _ERRORS[kind]
        if kind == _ADDED:
            group, place = divmod(index, _GROUP)
            return error(text.format(group=group, place=place))
        return error(text.format(name=self._frozen[index][0] if kind == _THAWED else self._names[index]))

    def _check_facts(self) -> int:
        """Returns the number of an error unless the parameters, of which some have changed, can be used."""
        for index, parameter in enumerate(self._parameters):
            if self._fixed and self._facts_of(parameter) != self._facts[index]:
                return _number(_FIXED, index)
            if parameter.dtype not in _DTYPES or gradient_dtype(parameter) not in _DTYPES:
                return _number(_DTYPE, index)
            if parameter.device != self._parameters[0].device or not _usable(parameter):
                return _number(_DEVICE, index)
        return 0

    def _find_places(self) -> bool:
        """Notes where in the model each parameter is registered; returns whether all are."""
        places: dict[int, tuple[dict[str, Any], str]] = {}
        for module in self._model.modules():
            registered = registered_in(module)
            for name, parameter in registered.items():
                places.setdefault(id(parameter), (registered, name))
        if not all(id(p) in places for p in self._parameters):
            return False
        self._places = [places[id(p)] for p in self._parameters]
        return True

    def _replaced(self) -> int:
        there = {id(p) for p in self._model.parameters()}
        return _number(_REPLACED, next(i for i, p in enumerate(self._parameters) if id(p) not in there))

    def _check_groups(self) -> int:
        """Follows parameters that left a group or changed it; returns the number of an error if some are new."""
        groups = self._optimizer.param_groups
        for number, group in enumerate(groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in self._known:
                    return _number(_ADDED, number * _GROUP + place)
        self._groups = [list(group["params"]) for group in groups]
        self.changed = True  # so that the ranks agree on it
        return 0


def _same(group: dict[str, Any], before: list[Any]) -> bool:
    now = group["params"]
    return len(now) == len(before) and all(map(is_, now, before))


def _usable(parameter: torch.Tensor) -> bool:
    try:
        view = arrays.view(parameter)
        if view.device != "cpu":
            devices.of(view)
    except (DtypeError, ExtensionError, ArgumentError):
        return False
    return True


def _number(kind: int, index: int) -> int:
    return 1 + kind + len(_ERRORS) * index
