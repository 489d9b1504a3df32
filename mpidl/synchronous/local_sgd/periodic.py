"""Local steps, and after each communication window a round in which all ranks average: what the algorithms share."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.optim import flat, validation
from mpidl.optim.flat import Flat
from mpidl.optim.optimizer import DistributedOptimizer
from mpidl.synchronous.reduction.statistics import Statistics

_NOTHING, _GRADIENTS, _PARAMETERS = range(3)  # what a rank brings to a round; in `finish()` nothing of its own accord


class Periodic(DistributedOptimizer):
    """Base of `ModelAveraging` and `DiLoCo`: any torch optimiser takes local steps, whose state stays with its rank.

    Rounds keep ranks together whose loaders differ: one that is in `finish()` answers the rounds of the others. The
    mean is that of the ranks that took steps since the last one; a rank whose parameters hold an infinity or a NaN is
    left out, counted in `statistics.nonfinite_rounds`, and goes on from the mean.

    Args:
        optimizer: takes the local steps; holds parameters of `model` only.
        model: parameters and buffers are broadcast from rank 0, in place.
        communication_window: local steps per round.
        warmup_steps: the gradients of so many first steps are averaged, step by step.
        comm: who trains together; default `mpidl.world()`.
        buffers: "mean" averages BatchNorm statistics and other floating buffers in `finish()`; "local" leaves them.
        own: further hyperparameters of the subclass, see `mpidl.optim.validation`; alike on all ranks.

    Raises:
        ArgumentError, DtypeError, MismatchError: as `mpidl.Downpour`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int,
        warmup_steps: int = 0,
        comm: Communicator | None = None,
        buffers: str = "mean",
        **own: Any,
    ) -> None:
        self._window_length, self._warmup = communication_window, warmup_steps
        common = {"communication_window": communication_window, "warmup_steps": warmup_steps, "buffers": buffers}
        self._hyperparameters = {**common, **own}
        error = validation.problem(type(self), self._hyperparameters)
        super().__init__(optimizer, model, comm=comm, buffers=buffers, error=error)
        self.statistics = Statistics()
        self._orders = flat.orders_of(self._held)
        self._layout = flat.layout_of(self._held, self._orders)
        self._group = Communicator(self._ranks.data)
        self._steps = 0  # local steps since the ranks last held the same parameters
        self._stop_wished = False
        self.stopping = False

    def _describe(self) -> dict[str, Any]:
        return self._hyperparameters

    @abstractmethod
    def _next(self, mean: Flat) -> Flat:
        """Returns the parameters that all ranks go on from, given their mean; may change it in place."""

    @abstractmethod
    def common_state(self) -> dict[str, Flat]:
        """Returns what all ranks keep alike between rounds, besides the parameters, as it would be after `finish()`."""

    # What the user calls.

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a local step; after `communication_window` of them, averages with all ranks.

        Raises:
            ArgumentError: a closure was given.
            ClosedError: `finish()` was called.
            RankFailedError: a thread of this process ended by an exception.
        """
        self._refuse(closure)
        failed = exit_protocol.thread_failure()
        if failed is not None:
            raise RankFailedError(f"rank {self._ranks.rank}: {failed}")
        if self.statistics.steps < self._warmup:
            self._round(_GRADIENTS, self._gradients())
        self._inner.step()
        self.statistics.steps += 1
        self._steps += 1
        if self.statistics.steps == self._warmup:
            self._steps = 0  # all ranks hold the same parameters
        if self._steps == self._window_length and self.statistics.steps > self._warmup:
            self._round(_PARAMETERS, self._flat())

    def averaged(self) -> dict[str, torch.Tensor]:
        """Returns what `finish()` would now make of the parameters, by name, and changes nothing; a collective."""
        mine = self._flat()
        words = self._group.allgather(np.array([self._steps > 0 and bool(np.isfinite(mine).all())], np.int64))
        if words.any():
            total = self._sum(mine if words[self._ranks.rank, 0] else None)
            total /= int(words.sum())
            mine = self._foreseen(total)
        dense = [torch.empty_like(view, memory_format=torch.contiguous_format) for view in self._views()]
        flat.unpack(self._layout, mine, dense)
        return {
            name: one.permute(tuple(np.argsort(order))).clone()
            for (name, _), one, order in zip(self._held, dense, self._orders, strict=True)
        }

    def request_stop(self) -> None:
        """Notes this rank's wish to stop; after the next round `stopping` is True on every rank."""
        self._stop_wished = True

    def own_state(self) -> dict[str, Flat]:
        """Returns what this rank alone keeps between rounds besides the inner optimiser's state, as flat arrays."""
        return {"parameters": self._flat(), "steps": np.array([self._steps])}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `own_state` returned; all ranks must, each from its own."""
        self._start_from(saved["parameters"])
        self._steps = int(saved["steps"][0])

    def restore_common_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `common_state` returned, on other ranks than those who saved it."""

    # Rounds.

    def _round(self, kind: int, mine: Flat | None) -> bool:
        """Averages what ranks brought; returns whether there was anything.

        Args:
            kind: of what this rank brings; _NOTHING in `finish()`.
            mine: this rank's part; None: it has none.
        """
        started = time.perf_counter()
        finite = mine is not None and bool(np.isfinite(mine).all())
        words = self._group.allgather(np.array([kind, mine is not None, finite, self._stop_wished], np.int64))
        self.stopping = self.stopping or bool(words[:, 3].any())
        agreed = int(words[:, 0].max())
        if agreed == _NOTHING and words[:, 1].any():
            agreed = _PARAMETERS  # all are in `finish()`, some with steps that nobody else has seen
        giving = words[:, 2].astype(bool)
        if agreed == _GRADIENTS:
            giving &= words[:, 0] == _GRADIENTS
        if agreed != _NOTHING and giving.any():
            self.statistics.bytes += self._layout.count * np.dtype(self._layout.dtype).itemsize
            self._take(agreed, kind, self._sum(mine if giving[self._ranks.rank] else None), int(giving.sum()))
        if agreed == _PARAMETERS:
            self._steps = 0  # also if nobody had anything finite to give
        self.statistics.nonfinite_rounds += mine is not None and not finite
        self.statistics.rounds += agreed != _NOTHING
        self.statistics.seconds_communicating += time.perf_counter() - started
        return agreed != _NOTHING

    def _take(self, agreed: int, kind: int, total: Flat, count: int) -> None:
        total /= count
        if agreed == _PARAMETERS:
            self._start_from(self._next(total))
        elif kind == _GRADIENTS:
            ordered = [p.grad.permute(order) for (_, p), order in zip(self._held, self._orders, strict=True)]  # type: ignore[union-attr]
            flat.unpack(self._layout, total, ordered)

    def _sum(self, mine: Flat | None) -> Flat:
        given = np.zeros(self._layout.count, self._layout.dtype) if mine is None else mine
        total = self._new()
        self._group.allreduce(given, "sum", out=total)
        return total

    def _gradients(self) -> Flat:
        """Returns the gradients, flat; a parameter that was not used gets one of zeros."""
        for _, p in self._held:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        ordered = [p.grad.permute(order).contiguous() for (_, p), order in zip(self._held, self._orders, strict=True)]  # type: ignore[union-attr]
        return flat.pack(self._layout, ordered)

    def _foreseen(self, mean: Flat) -> Flat:
        """Returns what `_next` would, and changes nothing else."""
        return self._next(mean)

    def _close(self) -> None:
        """Brings the tail, and answers the others' rounds until nobody has anything to bring."""
        while self._round(_NOTHING, self._flat() if self._steps else None):
            pass
        self._group.free()

    def _start_from(self, values: Flat) -> None:
        memory = self._new()
        memory[:] = values
        flat.unpack(self._layout, memory, self._views())

    def _new(self) -> Flat:
        return flat.new(self._layout, self._views()[0])

    def _flat(self) -> Flat:
        return flat.pack(self._layout, self._views())

    def _views(self) -> list[torch.Tensor]:
        return flat.views(self._held, self._orders)
