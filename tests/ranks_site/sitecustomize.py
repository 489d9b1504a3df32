"""Python reads this first in the tests' ranks, hundreds of which import torch: it makes that cheap.

The first optimizer of a process asks for torch._dynamo, and to import that package takes longer than to import torch:
1.5 s of CPU. Nothing here is compiled, and without compiling the two functions that optimizers call do what stands
below; whatever else is asked for is answered by the real package. And while a quarter of a million objects come into
being with torch, Python's garbage collector goes through them again and again, and once more when the process ends:
0.9 s of CPU. It rests until torch is there, leaves alone what came with it, and then works as ever. launching.py sets
PYTHONPATH; its WHOLE_TORCH does without.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

NAME = "torch._dynamo"


class Deferred(types.ModuleType):
    """Stands for torch._dynamo until more is wanted of it than these two."""

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        return function

    @staticmethod
    def graph_break(*_: object, **__: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks through sys.modules asks for these
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        return getattr(importlib.import_module(NAME), name)


class Uncollected:
    """The first to be asked where torch is: it says so, and gives it a loader that works without the collector."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = without_collecting(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def without_collecting(execute: Callable[[types.ModuleType], object]) -> Callable[[types.ModuleType], None]:
    def executed(module: types.ModuleType) -> None:
        gc.disable()
        try:
            execute(module)
        finally:
            gc.freeze()
            gc.enable()

    return executed


sys.modules[NAME] = Deferred(NAME)
sys.meta_path.insert(0, Uncollected)
