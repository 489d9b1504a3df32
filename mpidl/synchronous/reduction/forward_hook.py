"""The hook on a module that the user calls: makes the backward of each of its outputs end with the reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree

from mpidl.synchronous.reduction.reducer import Reducer


class AfterForward:
    """The model's forward hook: makes the backward of each output end with the reduction.

    In a copy or a pickle of the model the hook does nothing, so that the model is not tied to this process. In a graph
    that torch.compile makes of the model it does nothing either: the hooks on the parameters then do all the work.
    """

    def __init__(self, reducer: Reducer | None = None) -> None:
        self._reducer = reducer

    def __reduce__(self) -> tuple[type[AfterForward], tuple[()]]:
        return AfterForward, ()

    def __call__(self, model: torch.nn.Module, inputs: Any, output: Any) -> None:
        reducer = self._reducer
        if reducer is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        reducer.before_forward()
        for leaf in _pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
                leaf.register_hook(lambda _: reducer.before_backward())  # type: ignore[no-untyped-call]
