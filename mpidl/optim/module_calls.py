"""What mpidl does around a call of a module, and that no copy of the module takes along.

A hook of `register_forward_hook` would be copied and pickled with the module, compiled by torch.jit.script and traced
by torch.compile. torch keeps what `Module.compile` makes apart from all that, in `_compiled_call_impl`: the calls of
this one module in this process pass through it. mpidl puts an object there, around what it finds there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._C._dynamo import eval_frame

_PLACE = "_compiled_call_impl"


class ModuleCalls:
    """Calls of one module, with something done before and after each.

    Args:
        module: whose calls; those of its copies are left alone.
        before: called before each call.
        after: called with the output of each call.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        before: Callable[[], object] | None = None,
        after: Callable[[Any], object] | None = None,
    ) -> None:
        self._module, self._before, self._after = module, before, after
        self._within: Any = None
        self._around: Any = None
        self.watch()

    def watch(self) -> None:
        """Takes the place again, if `Module.compile` has put something else there."""
        found = self._module.__dict__.get(_PLACE)
        if found is None or found is not self._around:
            self._within = found
            self._around = _Around(self, self._module)
            self._module.__dict__[_PLACE] = self._around

    def remove(self) -> None:
        """Leaves the module's calls as they were."""
        self._before = self._after = None  # whoever has come around this one goes on calling it
        if self._module.__dict__.get(_PLACE) is self._around:
            if self._within is None:
                del self._module.__dict__[_PLACE]
            else:
                self._module.__dict__[_PLACE] = self._within

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the module; torch.compile looks into the module itself, and not into what is done around the call."""
        watched = not (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None)
        if watched and self._before is not None:
            _undisturbed(self._before)
        within: Callable[..., Any] = self._module._call_impl if self._within is None else self._within
        output = within(*args, **kwargs)
        if watched and self._after is not None:
            _undisturbed(self._after, output)
        return output


def _undisturbed(what: Callable[..., object], *arguments: Any) -> None:
    """Calls a function as it is, also where torch.compile would compile whatever runs next."""
    compiler = eval_frame.set_eval_frame(None)
    try:
        what(*arguments)
    finally:
        eval_frame.set_eval_frame(compiler)


class _Around:
    """What stands in the module's place; None in a copy or a pickle, also of a class that copies all its attributes.

    Args:
        calls: of the module.
        module: whose calls are watched.
    """

    def __init__(self, calls: ModuleCalls, module: torch.nn.Module) -> None:
        self._calls, self._module = calls, module

    @property  # type: ignore[misc]  # torch.jit.script passes functions over that it cannot compile, and no other attribute
    def __class__(self) -> type:
        return FunctionType

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        if not torch.compiler.is_compiling():
            # A replica or a shallow copy may share the module's attributes: torch says only in the frame who is called.
            called = sys._getframe(1).f_locals.get("self")
            if called is not module and isinstance(called, torch.nn.Module) and _PLACE in called.__dict__:
                return called._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._calls.run(args, kwargs)


def _leave_alone(*functions: Any) -> None:
    """Makes torch.compile pass these functions over, and compile what they call; where torch cannot, it traces them."""
    for function in functions:
        if hasattr(eval_frame, "set_code_exec_strategy"):
            action = eval_frame._FrameAction
            strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
            eval_frame.set_code_exec_strategy(function.__code__, strategy)
        elif hasattr(eval_frame, "skip_code"):  # before torch 2.7
            eval_frame.skip_code(function.__code__)


_leave_alone(ModuleCalls.run, _undisturbed, _Around.__call__)
