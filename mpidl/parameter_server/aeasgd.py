"""AEASGD, asynchronous elastic averaging SGD: workers and center are tied by springs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError
from mpidl.optim import validation
from mpidl.optim.flat import Flat
from mpidl.parameter_server.worker.locked import ExclusiveWorker


class AEASGD(ExclusiveWorker):
    """Every communication window moves worker and center towards each other by alpha * (x - center).

    Both sides move by the same amount, computed from the same pair, in one step for each shard: x + center stays what
    it was. As in the paper the exchange comes before the next local step, whose gradient was taken at x as it was:
    x - alpha * (x - center) - eta * g(x). A worker keeps parameters of its own; `finish()` makes them the center.
    Source: S. Zhang, A. Choromanska, Y. LeCun, *Deep learning with Elastic Averaging SGD*, NIPS 2015, Algorithm 1.

    Args:
        optimizer: takes the local steps; any.
        model, max_clock_spread, comm, buffers: as `Worker`.
        communication_window: local steps per exchange; the paper uses 10.
        beta: alpha = beta / workers, as in the paper.
        rho, learning_rate: both given: alpha = rho * learning_rate, whatever the number of workers, as in dist-keras
            (there 5 and 0.1; its learning_rate is not the optimiser's). If workers exchange at the same time, such an
            alpha acts like workers * alpha, which diverges above about 2.

    Raises:
        ArgumentError: alpha is not above 0 and at most 1; or as `Worker`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 10,
        beta: float = 0.9,
        rho: float | None = None,
        learning_rate: float | None = None,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
        error: Exception | None = None,
    ) -> None:
        self._beta, self._rho, self._learning_rate = beta, rho, learning_rate
        self.alpha = 0.0  # known when the number of workers is
        self._elastic = np.empty(0)  # of an exchange: what the worker gives to the center
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=error or self._problem(),
            hyperparameters={"beta": beta, "rho": rho, "learning_rate": learning_rate},
        )

    def _problem(self) -> ArgumentError | None:
        if (self._rho is None) != (self._learning_rate is None):
            return ArgumentError(
                f"rho={self._rho!r}, learning_rate={self._learning_rate!r}; alpha = rho * learning_rate needs both, "
                "alpha = beta / workers none of them"
            )
        if self._rho is None:
            return validation.positive("beta", self._beta)
        return validation.positive("rho", self._rho) or validation.positive("learning_rate", self._learning_rate)

    def _describe(self) -> dict[str, Any]:
        if self._rho is not None and self._learning_rate is not None:
            self.alpha, text = self._rho * self._learning_rate, "rho * learning_rate"
        else:
            self.alpha, text = self._beta / self._ranks.size, f"beta / {self._ranks.size} worker(s)"
        if self.alpha > 1:
            raise ArgumentError(f"alpha = {text} = {self.alpha:g}; expected at most 1, where worker and center swap")
        return super()._describe()

    def _local_step(self) -> None:
        if self._steps >= self._window_length:
            refused = self.statistics.refused_commits
            self._exchange()
            if self.statistics.refused_commits > refused:
                return  # the gradient was taken at parameters that are given up
        self._take_step()

    def _take_step(self) -> None:
        self._inner.step()

    def _exchange_if_due(self) -> None:
        """Nothing: it comes with the next step, or with `finish()`."""

    @property
    def exchanged(self) -> bool:
        """Always: `own_state` says where this worker stands."""
        return True

    def _prepare(self, reached: Flat) -> None:
        self._elastic = np.empty_like(reached)

    def _change(self, here: slice, reached: Flat, center: Flat) -> Flat:
        elastic = np.subtract(reached[here], center, out=self._elastic[here])
        elastic *= self.alpha
        changed: Flat = center + elastic
        return changed

    def _go_on(self, reached: Flat, center: Flat) -> None:
        self._start_from(np.subtract(reached, self._elastic, out=reached), given=True)
        self._give_back(center)

    def _own(self) -> dict[str, Flat]:
        return {"parameters": self._flat(), "steps": np.array([self._steps])}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        if "parameters" in saved:
            self._start_from(self._like(saved["parameters"]))
            self._steps = int(saved["steps"][0])
