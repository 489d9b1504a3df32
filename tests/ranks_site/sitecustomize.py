"""Python reads this first in the tests' ranks: they go without torch._dynamo until something really asks for it.

The first optimizer of a process asks for it, and to import that package takes longer than to import torch: 1.5 s of
CPU for each of hundreds of ranks. Nothing here is compiled, and without compiling the two functions that optimizers
call do what stands below; whatever else is asked for is answered by the real package. launching.py sets PYTHONPATH;
its WHOLE_TORCH does without.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
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


sys.modules[NAME] = Deferred(NAME)
