"""What a training step does once the gradients are there: reduce, and update; with shards and without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mpidl.cli.bench import targets
from mpidl.cli.bench.harness import Contender
from mpidl.cli.bench.models import Work
from mpidl.cli.bench.ranks import Together
from mpidl.synchronous.synchronous import Synchronous

_TOLERANCE = 1e-5  # of the largest weight: float32 sums in another order
_OPTIONS: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "fused": True}


@contextmanager
def contenders(ranks: Together, work: Work) -> Iterator[list[Contender]]:
    """Yields both; each has weights and gradients of its own."""
    sharded = _Sharded(ranks, work)
    yield [_Flat(ranks, work).contender(), sharded.contender()]
    sharded.optimizer.finish()


class _Update(ABC):
    """One way; the gradients are the same in every step, and differ by rank."""

    name: str

    def __init__(self, ranks: Together, work: Work) -> None:
        self._ranks = ranks
        torch.manual_seed(0)
        self._model = work.make()
        self._parameters = list(self._model.parameters())
        count = sum(p.numel() for p in self._parameters)
        generator = torch.Generator().manual_seed(ranks.rank)
        self._own = torch.randn(count, generator=generator)
        self._mean = self._own.numpy().astype(np.float64)
        ranks.raw.Allreduce(self._mean.copy(), self._mean)
        self._mean /= ranks.size
        self._steps, self._momentum, self._expected = 0, np.zeros(count), self._weights().astype(np.float64)

    def contender(self) -> Contender:
        return Contender(self.name, self._counted, self._check)

    def _counted(self) -> None:
        self._steps += 1
        self._run()

    @abstractmethod
    def _run(self) -> None:
        """Reduces and updates."""

    def _weights(self) -> np.ndarray[Any, Any]:
        return np.concatenate([p.detach().numpy().ravel() for p in self._parameters])

    def _check(self) -> str:
        """Compares the weights after one more step with those that numpy has, which took all steps before too."""
        self._counted()
        for _ in range(self._steps):
            self._momentum = 0.9 * self._momentum + self._mean
            self._expected -= _OPTIONS["lr"] * self._momentum
        self._steps = 0
        found = self._weights()
        error = float(np.abs(found - self._expected).max() / np.abs(self._expected).max())
        return "" if error <= _TOLERANCE else f"weights are wrong by {error:.1e} of the largest"


class _Flat(_Update):
    """All gradients in one flat array, reduced in place, then torch's fused SGD on every rank."""

    name = targets.REDUCE_UPDATE

    def __init__(self, ranks: Together, work: Work) -> None:
        super().__init__(ranks, work)
        self._flat, self._inner = self._own.clone(), torch.optim.SGD(self._parameters, **_OPTIONS)
        self._in, self._out, at = self._own.numpy(), self._flat.numpy(), 0
        for p in self._parameters:
            p.grad = self._flat[at : at + p.numel()].view(p.shape)
            at += p.numel()

    def _run(self) -> None:
        self._ranks.comm.allreduce(self._in, "mean", out=self._out)
        self._inner.step()


class _Sharded(_Update):
    """The sharded step, without a backward: its hooks are called as one would call them."""

    name = targets.SHARDED_UPDATE

    def __init__(self, ranks: Together, work: Work) -> None:
        super().__init__(ranks, work)
        inner = torch.optim.SGD(self._parameters, **_OPTIONS)
        self.optimizer = Synchronous(inner, self._model, comm=ranks.comm, shard=True)
        self._given, at = list[torch.Tensor](), 0
        for p in self._parameters:
            self._given.append(self._own[at : at + p.numel()].view(p.shape))
            at += p.numel()

    def _run(self) -> None:
        for p, gradient in zip(self._parameters, self._given, strict=True):
            p.grad = gradient
        self.optimizer._reducer.reduce()
        self.optimizer.step()


def gathered(ranks: Together, optimizer: Synchronous) -> np.ndarray[Any, Any]:
    """Returns the reduced gradients of all ranks' pieces, flat; a collective."""
    assert optimizer._sharded is not None
    weights = optimizer._sharded.weights
    flats = [torch.zeros(p.numel()) for p in weights.parameters]
    for index, piece in weights.pieces.items():
        if piece.owned and piece.tensor.grad is not None:
            flats[index][piece.start : piece.stop] = piece.tensor.grad
    mine = torch.cat([weights.in_shape(i, flat).flatten() for i, flat in enumerate(flats)]).numpy()
    total = np.empty_like(mine)
    ranks.raw.Allreduce(mine, total)
    return total
