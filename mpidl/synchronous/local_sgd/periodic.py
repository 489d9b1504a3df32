"""What local SGD algorithms share: local steps, and after each communication window a round of averaging."""

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
from mpidl.optim.flat_parameters import FlatParameters
from mpidl.synchronous.reduction.statistics import Statistics

_NOTHING, _GRADIENTS, _PARAMETERS = range(3)  # what a rank brings to a round; a rank in `finish()` asks for none itself


class Periodic(FlatParameters):
    """Base of `ModelAveraging` and `DiLoCo`: the user's optimiser takes local steps and keeps its state on its rank.

    Rounds keep ranks together whose loaders differ in length: a rank in `finish()` takes part in the rounds of the
    other ranks. The mean is that of the ranks that took steps since the last round. A rank whose parameters hold an
    infinity or a NaN is left out of the mean, counts the round in `statistics.nonfinite_rounds`, and goes on from the
    mean.

    Args:
        optimizer: takes the local steps; holds parameters of `model` only.
        model: its parameters and buffers are broadcast from rank 0, in place.
        communication_window: local steps per round.
        warmup_steps: number of first steps at each of which the gradients are averaged.
        comm: communicator of the ranks that train together; default `mpidl.world()`.
        buffers: "mean": `finish()` averages BatchNorm statistics and other floating buffers; "local": leaves them.
        own: further hyperparameters of the subclass, see `mpidl.optim.validation`; alike on all ranks.

    Raises:
        ArgumentError: an argument cannot work, or optimiser and model do not belong together; alike on all ranks.
        DtypeError: a parameter is not floating, or on a device that cannot be used.
        MismatchError: the ranks gave different models or arguments.
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
        self._lay_out()
        self._group = Communicator(self._ranks.data)
        self._steps = 0  # local steps since the ranks last held the same parameters
        self._stop_wished = False
        self.stopping = False

    def _describe(self) -> dict[str, Any]:
        return self._hyperparameters

    @abstractmethod
    def _next(self, mean: Flat) -> Flat:
        """Returns the parameters from which all ranks go on, given the ranks' mean; may overwrite `mean`."""

    @abstractmethod
    def common_state(self) -> dict[str, Flat]:
        """Returns the state besides the parameters that is alike on all ranks, as `finish()` would leave it.

        Call `averaged` first.
        """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a local step; after `communication_window` local steps, averages with all ranks.

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
        """Returns the parameters that `finish()` would leave now, by name, and changes none; a collective."""
        mine = self._flat()
        giving = self._group.allgather(np.array([self._steps > 0 and bool(np.isfinite(mine).all())], np.int64))
        if giving.any():
            total = self._sum(mine if giving[self._ranks.rank, 0] else None)
            total /= int(giving.sum())
            mine = self._like(self._foreseen(total))
        return self.named(mine)

    def request_stop(self) -> None:
        """Notes this rank's wish to stop; after the next round `stopping` is True on every rank."""
        self._stop_wished = True

    def own_state(self) -> dict[str, Flat]:
        """Returns this rank's own state between rounds besides the inner optimiser's, as flat arrays by name."""
        return {"parameters": self._flat(), "steps": np.array([self._steps])}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `own_state` returned; every rank must call this, each with its own state."""
        self._start_from(saved["parameters"])
        self._steps = int(saved["steps"][0])

    def restore_common_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `common_state` returned, with another number of ranks than the one that saved it."""

    # Rounds.

    def _round(self, kind: int, mine: Flat | None) -> bool:
        """Averages what the ranks bring; returns whether some rank brought gradients or parameters.

        Args:
            kind: which of the two this rank brings; _NOTHING in `finish()`.
            mine: this rank's gradients or parameters, flat; None: this rank has none.
        """
        started = time.perf_counter()
        finite = mine is not None and bool(np.isfinite(mine).all())
        everyone = self._group.allgather(np.array([kind, mine is not None, finite, self._stop_wished], np.int64))
        self.stopping = self.stopping or bool(everyone[:, 3].any())
        agreed = int(everyone[:, 0].max())
        if agreed == _NOTHING and everyone[:, 1].any():
            agreed = _PARAMETERS  # all ranks are in `finish()`, some with steps that no other rank has seen
        giving = everyone[:, 2].astype(bool)
        if agreed == _GRADIENTS:
            giving &= everyone[:, 0] == _GRADIENTS
        if agreed != _NOTHING and giving.any():
            self.statistics.bytes += self._layout.count * np.dtype(self._layout.dtype).itemsize
            self._apply(agreed, kind, self._sum(mine if giving[self._ranks.rank] else None), int(giving.sum()))
        if agreed == _PARAMETERS:
            self._steps = 0  # also if no rank's parameters were finite
        self.statistics.nonfinite_rounds += mine is not None and not finite
        self.statistics.rounds += agreed != _NOTHING
        self.statistics.seconds_communicating += time.perf_counter() - started
        return agreed != _NOTHING

    def _apply(self, agreed: int, kind: int, total: Flat, count: int) -> None:
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
        """Returns the gradients, flat; a parameter that was not used gets a gradient of zeros."""
        for _, p in self._held:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        ordered = [p.grad.permute(order).contiguous() for (_, p), order in zip(self._held, self._orders, strict=True)]  # type: ignore[union-attr]
        return flat.pack(self._layout, ordered)

    def _foreseen(self, mean: Flat) -> Flat:
        """Returns the parameters that `_next` would return, and leaves the algorithm's state as it is."""
        return self._next(mean)

    def _close(self) -> None:
        """Brings the steps since the last round, and takes part in rounds until no rank brings any more."""
        while self._round(_NOTHING, self._flat() if self._steps else None):
            pass
        self._group.free()

    def _start_from(self, values: Flat) -> None:
        flat.unpack(self._layout, self._like(values), self._views())
