"""The mark: what `p.grad` is where each rank has a part of the reduced gradient only.

A mark has the parameter's shape and no memory, and reads as NaN. What torch's own clipping, `GradScaler` and
`zero_grad(set_to_none=False)` do to gradients is done to this rank's piece instead, and norms are those of the whole
gradient, over all ranks. Other changes are refused by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree

from mpidl.errors import ArgumentError

_aten = torch.ops.aten
_ELEMENTWISE = frozenset(
    {"mul_", "div_", "clamp_", "clamp_min_", "clamp_max_", "zero_", "neg_", "nan_to_num_"}
    | {f"_foreach_{name}_" for name in ("mul", "div", "clamp_min", "clamp_max", "zero", "neg")}
)
_NORMS = ("linalg_vector_norm", "norm", "_foreach_norm")


class Change(NamedTuple):
    """An operation of torch on gradients, element by element; can be sent as JSON to ranks in `finish()`."""

    indices: list[int]  # of the parameters
    name: str
    overload: str
    arguments: Any  # without the gradients; [dtype, value] for a tensor of one element
    keywords: Any

    def apply(self, gradients: list[torch.Tensor]) -> None:
        """Changes these parts of the gradients."""
        function = getattr(getattr(_aten, self.name), self.overload)
        arguments = [_tensor(one) for one in self.arguments]
        keywords = {key: _tensor(one) for key, one in self.keywords.items()}
        with torch.no_grad():
            for one in [gradients] if self.name.startswith("_foreach_") else gradients:
                function(one, *arguments, **keywords)


def _tensor(argument: Any) -> Any:
    if not isinstance(argument, list):
        return argument
    dtype, value = argument
    return torch.tensor(value, dtype=getattr(torch, dtype.removeprefix("torch.")))


class Parts(Protocol):
    """What marks stand for: the pieces of all ranks."""

    def name(self, index: int) -> str:
        """Returns a parameter's name."""

    def changed(self) -> None:
        """Forgets what is known of gradients; alike on all ranks."""

    def change(self, change: Change) -> None:
        """Changes gradients; on each rank its own parts."""

    def norms(self, order: float) -> dict[int, float]:
        """Returns the norms of the gradients of all parameters; a collective."""

    def unscale(self, indices: Sequence[int], scale: float) -> bool:
        """Multiplies gradients; returns whether some rank has found one that was not finite. A collective."""


class Mark(torch.Tensor):
    """Stands for the reduced gradient of one parameter.

    Args:
        parameter: whose gradient.
        index: of the parameter.
        parts: of all parameters.
    """

    _index: int
    _parts: Parts

    @staticmethod
    def __new__(cls, parameter: torch.Tensor, index: int, parts: Parts) -> Mark:
        made: Mark = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, strides=parameter.stride(), dtype=parameter.dtype, device=parameter.device
        )
        made._index, made._parts = index, parts
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carries out one operation of torch in which a mark takes part."""
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        marks = [one for one in (args[0] if isinstance(args[0], list | tuple) else args[:1]) if isinstance(one, Mark)]
        if func is _aten.detach.default:
            return Mark(args[0], args[0]._index, args[0]._parts)
        if name == "_amp_foreach_non_finite_check_and_unscale_":
            found = marks[0]._parts.unscale([mark._index for mark in marks], float(args[2]))
            args[1].fill_(float(found or bool(args[1])))
            return None
        if name in _NORMS and marks:
            return _norm(name, marks, args, kwargs)
        if func._schema.is_mutable and marks:
            return _changed(func, name, marks, args, kwargs)
        args, kwargs = _pytree.tree_map_only(Mark, _as_nan, (args, kwargs))
        return func(*args, **kwargs)

    def untyped_storage(self) -> torch.UntypedStorage:  # torch's share_memory() touches what the storage points to
        return _as_nan(self).untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_nan(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return _as_nan(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<the gradient of {self._parts.name(self._index)}, of which each rank has a part>"


def _as_nan(mark: Mark) -> torch.Tensor:
    return torch.full((), torch.nan, dtype=mark.dtype).expand(mark.shape)


def _changed(func: Any, name: str, marks: list[Mark], args: Any, kwargs: Any) -> Any:
    """Changes this rank's parts of the gradients, if each element changes by itself and alike everywhere."""
    rest = [one for one in _pytree.tree_leaves((args[1:], kwargs)) if isinstance(one, torch.Tensor)]
    lists = any(isinstance(one, list | tuple) for one in args[1:])
    if name not in _ELEMENTWISE or lists or any(one.numel() != 1 or isinstance(one, Mark) for one in rest):
        raise ArgumentError(
            f"{name} on the gradient of parameter {marks[0]._parts.name(marks[0]._index)}: with shard=True each rank "
            "has its own part of each gradient, and p.grad stands for them; it can be multiplied, divided, clamped "
            "and set to zero or to None"
        )
    plain = _pytree.tree_map_only(torch.Tensor, lambda one: [str(one.dtype), one.item()], [args[1:], kwargs])
    change = Change([mark._index for mark in marks], name, func._overloadname, *plain)
    marks[0]._parts.change(change)
    return None if name.startswith("_foreach_") else args[0]


def _norm(name: str, marks: list[Mark], args: Any, kwargs: Any) -> Any:
    order = float(args[1]) if len(args) > 1 else float(kwargs.get("ord", kwargs.get("p", 2)))
    if len(args) > 2 or kwargs.get("dim") is not None:
        raise ArgumentError(
            f"{name} over dimensions of the gradient of parameter {marks[0]._parts.name(marks[0]._index)}: with "
            "shard=True p.grad has a norm over all its elements only"
        )
    norms, dtype = marks[0]._parts.norms(order), kwargs.get("dtype")
    found = [torch.tensor(norms[mark._index], dtype=dtype or mark.dtype) for mark in marks]
    return found if name.startswith("_foreach_") else found[0]
