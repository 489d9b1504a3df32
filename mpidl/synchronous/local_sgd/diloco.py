"""DiLoCo: averaging after many local steps; an outer optimiser takes the ranks' mean move for a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeFloat, PositiveFloat, PositiveInt, given
from mpidl.synchronous.local_sgd.periodic import Periodic


class DiLoCo(Periodic):
    """Takes an outer step with Nesterov momentum after each communication window of local steps.

    With theta the parameters where the window began and Delta = theta - mean of the ranks' parameters, the outer
    gradient: b = outer_momentum * b + Delta; theta = theta - outer_lr * (Delta + outer_momentum * b), the step of
    torch.optim.SGD with `nesterov=True`. With `outer_lr=1, outer_momentum=0` this is `ModelAveraging` bit for bit.

    Ranks may differ in their number of batches: a rank in `finish()` takes part in the rounds of the other ranks, and
    the mean is that of the ranks that took steps since the last round. A rank whose parameters hold an infinity or a
    NaN is left out of the mean, counts the round in `statistics.nonfinite_rounds`, and goes on from the mean.

    Source: A. Douillard et al., *DiLoCo: Distributed Low-Communication Training of Language Models*, 2023, where the
    inner optimiser is AdamW.

    Args:
        optimizer: takes the local steps; any torch optimiser over parameters of `model` only. Its state stays with its
            rank.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
        communication_window: local steps between two outer steps (H), 1 or more; 500 in the paper.
        outer_lr: learning rate of the outer step, above 0; 0.7 in the paper.
        outer_momentum: momentum of the outer step, 0 or more; 0.9 in the paper.
        comm: communicator of the ranks that train together; default `mpidl.world()`.
        buffers: "mean": `finish()` averages BatchNorm statistics and other floating buffers over the ranks; "local":
            each rank keeps its own.

    Raises:
        ArgumentError: an argument cannot work, or optimiser and model do not belong together; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or the
            parameters lie on several devices.
        MismatchError: the ranks gave different models, hyperparameters or arguments.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 500,
        outer_lr: PositiveFloat = 0.7,
        outer_momentum: NonNegativeFloat = 0.9,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._lr, self._momentum = outer_lr, outer_momentum
        super().__init__(optimizer, model, **given(locals()))
        self._window_start = self._flat()  # theta, where the window began
        self._velocity = np.zeros_like(self._window_start)  # b
        self._velocity_at_finish = self._velocity  # b as `finish()` would leave it, for `common_state`

    def _next(self, mean: Flat) -> Flat:
        self._window_start, self._velocity = self._outer_step(mean)
        self._velocity_at_finish = self._velocity
        return self._window_start

    def _foreseen(self, mean: Flat) -> Flat:
        theta, self._velocity_at_finish = self._outer_step(mean)
        return theta

    def _outer_step(self, mean: Flat) -> tuple[Flat, Flat]:
        delta = self._window_start - mean
        velocity = self._momentum * self._velocity + delta
        # theta - lr * (delta + momentum * b), rewritten with theta = delta + mean: a step of lr 1 without momentum then
        # gives the mean exactly.
        theta = (1 - self._lr) * delta - self._lr * self._momentum * velocity
        theta += mean
        return theta, velocity

    def _start_anew(self, values: Flat) -> None:
        self._window_start = values

    def common_state(self) -> dict[str, Flat]:
        return {"velocity": self._velocity_at_finish.copy()}

    def restore_common_state(self, saved: Mapping[str, Flat]) -> None:
        self._window_start = self._flat()
        if "velocity" in saved:
            self._velocity = self._velocity_at_finish = saved["velocity"].copy()

    def own_state(self) -> dict[str, Flat]:
        return super().own_state() | {"begun": self._window_start.copy(), "velocity": self._velocity.copy()}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        super().restore_own_state(saved)
        self._window_start, self._velocity = saved["begun"].copy(), saved["velocity"].copy()
        self._velocity_at_finish = self._velocity
