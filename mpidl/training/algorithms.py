"""The algorithms of `mpidl train`: their classes, and what may be said of them on the command line.

No torch here: what is wrong can be refused at once. A test holds the tables against the classes' signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpidl.errors import ArgumentError
from mpidl.training.settings import Settings


@dataclass(frozen=True)
class Algorithm:
    """One choice of --algorithm."""

    class_name: str  # in mpidl
    says: str  # for --help
    window: int = 3  # local steps per exchange, unless the user chose
    hyperparameters: Mapping[str, type] = field(default_factory=dict)  # that --set takes
    synchronous: bool = False  # all ranks keep pace
    periodic: bool = False  # of these: they communicate in rounds only

    def arguments(self, settings: Settings) -> dict[str, Any]:
        """Returns what the class is given besides optimiser, model and communicator."""
        if self.class_name == "Synchronous":
            return {"shard": settings.shard}
        own = {"communication_window": settings.communication_window, **parsed(settings)}
        return own if self.synchronous else {**own, "max_clock_spread": settings.max_clock_spread}


_OVERLAP = {"overlap": int}
_ELASTIC = {"beta": float, "rho": float, "learning_rate": float}
BY_NAME = {
    "synchronous": Algorithm("Synchronous", "mean gradient by allreduce", synchronous=True),
    "downpour": Algorithm("Downpour", "workers commit what their local steps moved", hyperparameters=_OVERLAP),
    "agn": Algorithm("AGN", "the mean of these moves", hyperparameters=_OVERLAP),
    "dynsgd": Algorithm("DynSGD", "their sum / (staleness + 1)", hyperparameters=_OVERLAP),
    "adag": Algorithm("ADAG", "their sum, scaled by distance", hyperparameters={"gamma": float}),
    "aeasgd": Algorithm("AEASGD", "elastic averaging", 10, _ELASTIC),
    "eamsgd": Algorithm("EAMSGD", "the same with Nesterov's momentum", 10, _ELASTIC),
    "dcasgd": Algorithm("DCASGD", "gradients, corrected for delay", 1, {"lambda_": float}),
    "gem": Algorithm("GEM", "gradient energy matching", 1, {"kappa": float, "epsilon": float}),
    "distbelief": Algorithm(
        "DistBelief",
        "gradients, Adagrad at the server",
        1,
        {"n_push": int, "n_fetch": int, "gamma": float, "warm_start": int, "overlap": int},
    ),
    "model-averaging": Algorithm(
        "ModelAveraging", "local SGD: all parameters are averaged", 16, {"warmup_steps": int}, True, True
    ),
    "diloco": Algorithm(
        "DiLoCo", "the same with an outer Nesterov step", 500, {"outer_lr": float, "outer_momentum": float}, True, True
    ),
}


def window(settings: Settings) -> int | None:
    """Returns the local steps per exchange, None in the synchronous way, where every step is one."""
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
            f"--max-clock-spread {settings.max_clock_spread}: with --algorithm {name} all ranks keep pace anyway"
        )
    if settings.shard and name != "synchronous":
        raise ArgumentError(f"--shard: --algorithm {name} cannot share weights; synchronous can")
