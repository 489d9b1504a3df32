"""Small models, data that differ by rank, and the comparisons of trained models. Uses no MPI."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mpidl.mpi import exit_protocol

FEATURES = 6


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Sequential:
    """A small model, the same for the same seed."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, 1)).to(dtype)


def batch(
    rank: int, step: int, count: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of one rank and step: inputs (count, FEATURES) and targets (count, 1)."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(x.sum(1, keepdim=True)).to(dtype)


def union(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples of several batches as one."""
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def loss_of(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean squared error."""
    x, y = data
    return ((model(x) - y) ** 2).mean()


def assert_close(found: torch.nn.Module, expected: torch.nn.Module, bound: float = 1e-12) -> None:
    """|a - b| <= bound * max(|a|, rms of that tensor), for every element of every parameter."""
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        a, b = ours.detach().double(), theirs.detach().double()
        limit = bound * torch.maximum(a.abs(), (b**2).mean().sqrt())
        worst = ((a - b).abs() - limit).max()
        assert worst <= 0, f"{name}: an element is off by {worst} more than allowed"


def abandon(optimizer) -> None:
    """Gives up an optimizer whose ranks have come apart on purpose, so that this process may still end quietly."""
    exit_protocol.closed(optimizer._token)


def assert_alike(comm, model: torch.nn.Module) -> None:
    """Every rank holds the same parameters, bit for bit."""
    flat = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    assert torch.equal(comm.allreduce(flat, "min"), comm.allreduce(flat, "max"))
