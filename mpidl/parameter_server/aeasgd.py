"""AEASGD, asynchronous elastic averaging SGD: workers and center are tied by springs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeInt, PositiveFloat, PositiveInt, given
from mpidl.parameter_server.worker.locked import LockedWorker


class AEASGD(LockedWorker):
    """Every communication window moves worker and center towards each other by alpha * (x - center).

    Both sides move by the same amount, computed from the same pair, in one step for each shard: x + center stays what
    it was. As in the paper the exchange comes before the next local step, whose gradient was taken at x as it was:
    x - alpha * (x - center) - eta * g(x). A worker keeps parameters of its own; `finish()` makes them the center.
    Source: S. Zhang, A. Choromanska, Y. LeCun, *Deep learning with Elastic Averaging SGD*, NIPS 2015, Algorithm 1.

    Args:
        optimizer: takes the local steps; any torch optimiser, holding parameters of `model` only. Its state stays with
            this worker.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            The center starts from them.
        communication_window: local steps per exchange, 1 or more; 10 by default, as in the paper.
        beta: the elastic rate alpha is beta / workers, as in the paper; above 0; 0.9 by default.
        rho: with `learning_rate`: alpha is rho * learning_rate, whatever the number of workers, as in dist-keras (5 and
            0.1 there). If n workers exchange at the same time, such an alpha acts like n * alpha, which diverges above
            about 2. None, the default: `beta` decides.
        learning_rate: see `rho`; not the optimiser's.
        max_clock_spread: exchanges that a worker may be ahead of the slowest one (SSP); None, the default: any number.
        comm: the ranks that train together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean", the default, averages BatchNorm statistics and other floating buffers in `finish()`; "local"
            leaves them.

    Raises:
        ArgumentError: alpha is above 1, or one of `rho` and `learning_rate` is missing; optimiser and model do not
            belong together, or an argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 10,
        beta: PositiveFloat = 0.9,
        rho: PositiveFloat | None = None,
        learning_rate: PositiveFloat | None = None,
        max_clock_spread: NonNegativeInt | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._beta, self._rho, self._learning_rate = beta, rho, learning_rate
        self.alpha = 0.0  # known when the number of workers is
        self._elastic = np.empty(0)  # of an exchange: what the worker gives to the center
        super().__init__(optimizer, model, **given(locals()))

    def _describe(self) -> dict[str, Any]:
        if (self._rho is None) != (self._learning_rate is None):
            raise ArgumentError(
                f"rho={self._rho!r}, learning_rate={self._learning_rate!r}; alpha = rho * learning_rate needs both, "
                "alpha = beta / workers none of them"
            )
        if self._rho is not None and self._learning_rate is not None:
            self.alpha, text = self._rho * self._learning_rate, "rho * learning_rate"
        else:
            self.alpha, text = self._beta / self._ranks.size, f"beta / {self._ranks.size} worker(s)"
        if self.alpha > 1:
            raise ArgumentError(f"alpha = {text} = {self.alpha:g}; expected at most 1, where worker and center swap")
        return super()._describe()

    def _local_step(self) -> None:
        if self._steps >= self._window_length and self._exchange().refused:
            return  # the gradient was taken at parameters that are given up
        self._take_step()

    def _take_step(self) -> None:
        self._step_inner()

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
