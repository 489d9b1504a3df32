"""The worker's side, shared by all algorithms: local steps, and an exchange after each communication window.

An algorithm is a subclass that says what is committed (`_rule`). Nothing between the constructor and `finish()` is a
collective: no worker ever waits for another.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mpidl import leaving, state
from mpidl.communicator import Communicator
from mpidl.errors import ArgumentError, RankFailedError
from mpidl.layout import Tensor, lay_out
from mpidl.optimizer import DistributedOptimizer
from mpidl.parameter_server import flat
from mpidl.parameter_server.server import Aim, Server


@dataclass
class Statistics:
    """What asynchronous training did so far on this rank."""

    steps: int = 0  # local optimiser steps
    commits: int = 0
    refused_commits: int = 0  # held an infinity or a NaN; the center was pulled instead
    staleness: Counter[int] = field(default_factory=Counter)  # commits of others between pull and commit -> how often
    bytes: int = 0  # committed and pulled
    seconds_communicating: float = 0.0

    @property
    def mean_staleness(self) -> float:
        """The mean of the histogram; NaN before the first commit."""
        total = sum(self.staleness.values())
        return sum(tau * n for tau, n in self.staleness.items()) / total if total else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "staleness": dict(sorted(self.staleness.items())), "mean_staleness": self.mean_staleness}


class Worker(DistributedOptimizer):
    """Base of the asynchronous optimisers: any torch optimiser takes local steps, then deltas are exchanged.

    The inner optimiser's state (momentum, moments) is this worker's own and is kept across pulls.

    Args:
        optimizer: takes the local steps; holds parameters of `model` only. Hyperparameters may differ between ranks.
        model: parameters and buffers are broadcast from rank 0, in place; the center starts from them.
        communication_window: local steps per exchange; 5 as in dist-keras.
        comm: who trains together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean" averages BatchNorm statistics and other floating buffers in `finish()`; "local" leaves them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 5,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._window_length = communication_window
        error = None
        if not isinstance(communication_window, int) or communication_window < 1:
            error = ArgumentError(f"communication_window={communication_window!r}; expected a whole number, 1 or more")
        super().__init__(optimizer, model, comm=comm, buffers=buffers, error=error)
        self.statistics = Statistics()
        self._orders = [state.memory_order(p) for _, p in self._held]
        wide = any(p.dtype == torch.float64 for _, p in self._held)
        tensors = [
            Tensor(name, tuple(view.shape), state.dtype_name(view))
            for (name, _), view in zip(self._held, self._views(), strict=True)
        ]
        self._layout = lay_out(tensors, "float64" if wide else "float32")
        self._start = self._flat()  # the local parameters at the last pull, as they were rounded to the model's dtype
        self._server = Server(self._ranks, self._start, type(self).__name__, self.comm.service)
        self._clock = 0  # at the last pull
        self._steps = 0  # local steps since the last pull
        self._last: tuple[int, np.ndarray[Any, Any]] | None = None  # clock and center at `finish()`
        self._stop_wished = False
        self.stopping = False

    def _describe(self) -> dict[str, Any]:
        return {"communication_window": self._window_length, "buffers": self._buffers}

    @abstractmethod
    def _rule(self, moved: np.ndarray[Any, Any], steps: int) -> np.ndarray[Any, Any]:
        """Returns what is committed after `steps` local steps that `moved` the parameters; may change it in place."""

    def _commits_the_move(self, steps: int) -> bool:
        """Returns whether `_rule` gives back `moved` unchanged; then a commit that met no other is exact."""
        return False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a local step; after `communication_window` of them, commits and pulls.

        Raises:
            ArgumentError: a closure was given.
            ClosedError: `finish()` was called.
            RankFailedError: a thread of this process ended by an exception, or another rank has died.
        """
        self._refuse(closure)
        failed = leaving.thread_failure()
        if failed is not None:  # there is no step header here that would tell the others: ending this rank does
            raise RankFailedError(f"rank {self._ranks.rank}: {failed}")
        self._inner.step()
        self.statistics.steps += 1
        self._steps += 1
        if self._steps == self._window_length:
            self._exchange()

    def center(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Returns the clock and a copy of the center variable, by parameter name; one-sided, not a collective."""
        clock, pulled = self.snapshot()
        return clock, self.named(pulled)

    def snapshot(self) -> tuple[int, np.ndarray[Any, Any]]:
        """Returns the clock and a copy of the flat center, exact; one-sided. After `finish()`, as they were there."""
        if self._last is not None:
            return self._last
        pulled = flat.new(self._layout, self._held[0][1].detach())
        return self._server.pull(pulled), pulled

    def named(self, center: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        """Returns the parts of a flat center by parameter name, in the parameters' dtypes, on their device.

        Args:
            center: as `snapshot` gave it.
        """
        dense = [torch.empty_like(view, memory_format=torch.contiguous_format) for view in self._views()]
        flat.unpack(self._layout, center, dense)
        return {
            name: one.permute(tuple(np.argsort(order))).clone()
            for (name, _), one, order in zip(self._held, dense, self._orders, strict=True)
        }

    def restore(self, clock: int, center: np.ndarray[Any, Any] | None = None) -> None:
        """Makes a run go on from a saved center; a collective before the first step.

        Args:
            clock: how many commits are in it.
            center: as `snapshot` gave it, if it is wider than the parameters, which the model holds already.
        """
        if self._ranks.rank == 0:
            self._server.restore(clock, None if center is None else center - self._start)
        self._ranks.barrier("restoring the center")  # nobody may commit before, nor pull
        self._pull()

    @property
    def exchanged(self) -> bool:
        """Whether this worker took no local step since its last exchange."""
        return self._steps == 0

    def request_stop(self) -> None:
        """Asks all workers to stop; each sees `stopping` become True at its next commit."""
        self._stop_wished = True

    def finish(self) -> None:
        """Ends training; a collective, harmless the second time.

        The steps since the last exchange are committed, all workers are waited for, and every rank's parameters become
        the center as it then is.
        """
        try:
            super().finish()
        finally:
            self._server.end_progress()  # also if it failed: no thread may go on

    def _close(self) -> None:
        if self._steps:
            self._exchange()
        self._ranks.barrier("finish")  # after it every commit has landed: each rank flushed its own
        self._last = self._pull()
        self._server.close()

    def _exchange(self) -> None:
        started = time.perf_counter()
        self._server.look()
        if self._stop_wished:
            self._server.clock.request_stop()
            self._stop_wished = False
        reached = self._flat()
        delta = self._rule(reached - self._start, self._steps)
        if np.isfinite(delta).all():
            same_dtype = all(state.dtype_name(p) == self._layout.dtype for _, p in self._held)
            exact = same_dtype and self._commits_the_move(self._steps)
            number = self._server.commit(delta, Aim(self._clock, self._start, reached) if exact else None)
            self.statistics.commits += 1
            self.statistics.staleness[number - self._clock] += 1
            self.statistics.bytes += delta.nbytes
        else:
            self._refuse_commit()
        self._pull()
        self.stopping = self._server.clock.stop_requested()
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _refuse_commit(self) -> None:
        """Keeps an infinity or a NaN out of the center, where it would reach everybody; says so the first time."""
        self.statistics.refused_commits += 1
        if self.statistics.refused_commits == 1:
            leaving.say(
                f"rank {self._ranks.rank}: a commit held an infinity or a NaN and was refused; this worker goes on "
                "from the center. If it happens again and again, the local optimizer's state (momentum) may hold it too"
            )

    def _pull(self) -> tuple[int, np.ndarray[Any, Any]]:
        views = self._views()
        pulled = flat.new(self._layout, views[0])
        self._clock = self._server.pull(pulled)
        self.statistics.bytes += pulled.nbytes
        flat.unpack(self._layout, pulled, views)
        # Packed again: what local steps start from is the center rounded to the model's dtype, and only what they move
        # may be committed.
        self._start = self._flat()
        self._steps = 0
        return self._clock, pulled

    def _flat(self) -> np.ndarray[Any, Any]:
        return flat.pack(self._layout, self._views())

    def _views(self) -> list[torch.Tensor]:
        """Returns the parameters as they lie in memory now: `model.to()` and the like give them other memory."""
        return [p.detach().permute(order) for (_, p), order in zip(self._held, self._orders, strict=True)]
