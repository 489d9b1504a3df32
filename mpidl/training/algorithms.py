"""The algorithms of `mpidl train`: their classes, and what may be said of them on the command line.

What `--set` takes is read from the source of each class, where the signature of the constructor declares it: an import
of the class would import torch, which takes seconds, and what is wrong can be refused at once.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import mpidl
from mpidl.errors import ArgumentError
from mpidl.training.settings import Settings

# Keyword arguments of the classes that --set does not take: the first two have options of their own.
_NOT_SET = frozenset({"communication_window", "max_clock_spread", "comm", "buffers"})


@dataclass(frozen=True)
class Algorithm:
    """One choice of --algorithm."""

    class_name: str  # in mpidl
    says: str  # for --help
    default_window: int | None = None  # local steps per exchange unless the user chose; None: the class's default
    synchronous: bool = False  # all ranks take their steps together
    periodic: bool = False  # of these: they communicate in rounds only

    @cached_property
    def _declared(self) -> dict[str, tuple[str, Any]]:
        return _keywords(mpidl._HOME[self.class_name], self.class_name)

    @cached_property
    def hyperparameters(self) -> Mapping[str, type]:
        """What --set takes, by name: int or float."""
        if self.class_name == "Synchronous":
            return {}
        declared = {name: hint for name, (hint, _) in self._declared.items() if name not in _NOT_SET}
        return {name: int if "Int" in hint else float for name, hint in declared.items()}

    @property
    def window(self) -> int:
        """Local steps per exchange, unless the user chose."""
        return self.default_window or int(self._declared["communication_window"][1])

    def arguments(self, settings: Settings) -> dict[str, Any]:
        """Returns what the class is given besides optimiser, model and communicator."""
        if self.class_name == "Synchronous":
            return {"shard": settings.shard}
        own = {"communication_window": settings.communication_window, **parsed(settings)}
        return own if self.synchronous else {**own, "max_clock_spread": settings.max_clock_spread}


BY_NAME = {
    "synchronous": Algorithm("Synchronous", "mean gradient by allreduce", 3, synchronous=True),
    "downpour": Algorithm("Downpour", "workers commit what their local steps moved", 3),
    "agn": Algorithm("AGN", "the mean of these moves", 3),
    "dynsgd": Algorithm("DynSGD", "their sum / (staleness + 1)", 3),
    "adag": Algorithm("ADAG", "their sum, scaled by distance", 3),
    "aeasgd": Algorithm("AEASGD", "elastic averaging"),
    "eamsgd": Algorithm("EAMSGD", "the same with Nesterov's momentum"),
    "dcasgd": Algorithm("DCASGD", "gradients, corrected for delay"),
    "gem": Algorithm("GEM", "gradient energy matching"),
    "distbelief": Algorithm("DistBelief", "gradients, Adagrad at the server"),
    "model-averaging": Algorithm(
        "ModelAveraging", "local SGD: all parameters are averaged", synchronous=True, periodic=True
    ),
    "diloco": Algorithm("DiLoCo", "the same with an outer Nesterov step", synchronous=True, periodic=True),
}


def _keywords(module: str, class_name: str) -> dict[str, tuple[str, Any]]:
    """Returns the annotation and the default of each keyword argument of a class's constructor, by name.

    Args:
        module: where the class is, within mpidl.
        class_name: if it has no constructor, that of its first base counts.
    """
    source = resources.files("mpidl") / f"{module.replace('.', '/')}.py"
    tree = ast.parse(source.read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {
                arg.arg: (ast.unparse(arg.annotation or ast.Constant(None)), ast.literal_eval(default))
                for arg, default in pairs
                if default is not None
            }
    base = ast.unparse(found.bases[0])
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module)
    (home,) = (str(node.module) for node in imports if base in {one.name for one in node.names})
    return _keywords(home.removeprefix("mpidl."), base)


def window(settings: Settings) -> int | None:
    """Returns the local steps per exchange, None for `--algorithm synchronous`, where every step is one."""
    return None if settings.algorithm == "synchronous" else settings.communication_window


def parsed(settings: Settings) -> dict[str, Any]:
    """Returns the hyperparameters that the user gave, as numbers.

    Raises:
        ArgumentError: one is no NAME=VALUE, unknown to the algorithm, not a number of its type, or given twice.
    """
    known = BY_NAME[settings.algorithm].hyperparameters
    found: dict[str, Any] = {}
    for text in settings.hyperparameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise ArgumentError(f"--set {text}: expected NAME=VALUE, such as --set gamma=0.01")
        if name not in known:
            listed = f"has {', '.join(known)}" if known else "has none"
            raise ArgumentError(f"--set {text}: --algorithm {settings.algorithm} {listed}")
        if name in found:
            raise ArgumentError(f"--set {text}: {name} was given before; give it once")
        try:
            found[name] = known[name](value)
        except ValueError as error:
            kind = "whole number" if known[name] is int else "number"
            raise ArgumentError(f"--set {text}: expected a {kind}") from error
    return found


def check(settings: Settings) -> None:
    """Refuses options that the algorithm has no use for.

    Raises:
        ArgumentError: one does not go with --algorithm.
    """
    name, algorithm = settings.algorithm, BY_NAME[settings.algorithm]
    parsed(settings)
    if algorithm.synchronous and settings.servers:
        raise ArgumentError(
            f"--servers {settings.servers}: --algorithm {name} has no parameter server; the asynchronous algorithms do"
        )
    if algorithm.synchronous and settings.max_clock_spread is not None:
        raise ArgumentError(
            f"--max-clock-spread {settings.max_clock_spread}: with --algorithm {name} all ranks take their steps "
            "together anyway"
        )
    if settings.shard and name != "synchronous":
        raise ArgumentError(f"--shard: --algorithm {name} cannot share weights; synchronous can")
