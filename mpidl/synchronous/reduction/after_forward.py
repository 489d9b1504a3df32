"""What is done after a forward of the model, through which a backward of its output ends with the reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree

from mpidl.synchronous.reduction.reducer import Reducer


def after_forward(reducer: Reducer, output: Any) -> None:
    """Makes the backward of each output of the model end with the reduction."""
    if not torch.is_grad_enabled():
        return
    reducer.before_forward()
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
            leaf.register_hook(lambda _: reducer.before_backward())  # type: ignore[no-untyped-call]
