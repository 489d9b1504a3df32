"""What `Reducer` asks of autograd and of the model: whether a backward is under way, and whose hooks run in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable

import torch
from torch.nn.modules import module as torch_module

_ENGINE = torch.autograd.graph._engine_run_backward.__code__


def in_backward() -> bool:
    """Returns whether this thread is inside a backward, or else whether another thread is."""
    if torch._C._current_graph_task_id() != -1:
        return True
    here = threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame = top if thread != here else None
        while frame is not None:
            if frame.f_code is _ENGINE:
                return True
            frame = frame.f_back
    return False


def has_backward_hooks(modules: Iterable[torch.nn.Module]) -> bool:
    """Returns whether some module calls hooks of the user in backward, which may write to any gradient."""
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return True
    return any(module._backward_hooks or module._backward_pre_hooks for module in modules)


def install_hooks(parameters: Iterable[torch.Tensor]) -> None:
    """Makes autograd call the hooks of parameters again, the user's too, after `torch.utils.swap_tensors` lost them."""
    for parameter in parameters:
        hooks = parameter._post_accumulate_grad_hooks
        if hooks is not None:
            parameter._post_accumulate_grad_hooks = hooks


class Swaps:
    """Sees whether a parameter has been swapped for another tensor, whose version counter then begins anew.

    Args:
        parameter: one that stands for all, since modules swap all of theirs.
    """

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter = parameter
        self._last = self._now()

    def _now(self) -> tuple[int, torch.dtype]:
        return 0 if self._parameter.is_inference() else self._parameter._version, self._parameter.dtype

    def seen(self) -> bool:
        """Returns whether the parameter may have been swapped since the last call."""
        before, self._last = self._last, self._now()
        return self._last[0] < before[0] or self._last[1] is not before[1]
