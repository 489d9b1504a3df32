"""How much memory a rank needs for weights, gradients and the state of AdamW; one way to train in one launch.

    mpidl run -n 2 -- python benchmarks/memory.py "mpidl.Synchronous, shard=True"

Without an argument the program prints the names of all ways. The figure is the proportional set size, in which memory
that n processes share counts 1/n for each: after a few steps, less what it was before the model was made. What the
allocators keep is in it, and in another way's launch it is another's.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpidl
from mpidl.cli.bench import gloo
from mpidl.cli.bench.ranks import Together

_MIB = 2**20
_WIDTH, _DEPTH, _STEPS = 2048, 6, 3  # 25 M elements, few activations


@dataclass(frozen=True)
class Report:
    """MiB, the largest of all ranks."""

    way: str
    weights: float  # of one copy
    rank: float

    def __str__(self) -> str:
        return f"{self.way}: {self.rank:.0f} MiB per rank, {self.rank / self.weights:.2f} times the weights"


def proportional_set_size() -> int:
    """Returns this process's, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(way: str, ranks: Together) -> Report:
    """Trains a few steps; a collective.

    Args:
        way: one of `WAYS`.
        ranks: who trains.
    """
    torch.set_num_threads(1)
    x = torch.randn(4, _WIDTH)
    with WAYS[way](ranks, nn.Linear(_WIDTH, 1)) as (module, optimizer):  # what libraries need for themselves
        _step(module, optimizer, x)
    del module, optimizer
    gc.collect()
    ranks.barrier()
    before = proportional_set_size()
    model = nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_DEPTH)])
    with WAYS[way](ranks, model) as (module, optimizer):
        for _ in range(_STEPS):
            _step(module, optimizer, x)
        gc.collect()
        ranks.barrier()
        after = proportional_set_size()
        ranks.barrier()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Report(way, weights / _MIB, max(ranks.everywhere((after - before) / _MIB)))


def _step(module: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()


@contextmanager
def _unsharded(ranks: Together, model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    with mpidl.Synchronous(torch.optim.AdamW(model.parameters()), model, comm=ranks.comm) as optimizer:
        yield model, optimizer


@contextmanager
def _sharded(ranks: Together, model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    inner = torch.optim.AdamW(model.parameters())
    with mpidl.Synchronous(inner, model, comm=ranks.comm, shard=True) as optimizer:
        yield model, optimizer


@contextmanager
def _ddp(ranks: Together, model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    with gloo.process_group(ranks):
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        yield wrapped, torch.optim.AdamW(model.parameters())


@contextmanager
def _zero(ranks: Together, model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with gloo.process_group(ranks):
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        yield wrapped, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)


WAYS: dict[str, Callable[[Together, nn.Module], Any]] = {
    "mpidl.Synchronous": _unsharded,
    "mpidl.Synchronous, shard=True": _sharded,
    "torch DDP/gloo": _ddp,
    "torch DDP/gloo, ZeroRedundancyOptimizer": _zero,
}


def main(ways: list[str]) -> None:
    for way in ways:
        ranks = Together(mpidl.world())
        report = measure(way, ranks)
        if ranks.rank == 0:
            print(report, flush=True)
        ranks.free()
    if not ways:
        print(*WAYS, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
