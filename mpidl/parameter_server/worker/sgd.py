"""What rules that work on gradients read of torch's SGD, and how they take its steps without its momentum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mpidl.optim import state


@contextmanager
def stepping_with(optimizer: torch.optim.Optimizer, **values: Any) -> Iterator[None]:
    """Gives every parameter group other hyperparameters meanwhile; what hooks change of others stays changed."""
    before = [{key: group[key] for key in values} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(values)
    try:
        yield
    finally:
        for group, kept in zip(optimizer.param_groups, before, strict=True):
            group.update(kept)


def of_each(optimizer: torch.optim.Optimizer, held: state.Named, key: str) -> list[float]:
    """Returns a hyperparameter of each parameter in `held`, in that order."""
    found = {id(p): float(group[key]) for group in optimizer.param_groups for p in group["params"]}
    return [found[id(p)] for _, p in held]
