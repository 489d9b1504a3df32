"""DiLoCo: averaging after many local steps, with an outer optimiser that takes the mean move for a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.validation import NonNegativeFloat, PositiveFloat, PositiveInt, given
from mpidl.synchronous.local_sgd.periodic import Periodic


class DiLoCo(Periodic):
    """After each communication window Nesterov's momentum takes an outer step from where the window began.

    With theta where it began and Delta = theta - mean of the ranks' parameters, the outer gradient: b = momentum * b +
    Delta; theta = theta - lr * (Delta + momentum * b), as torch's SGD has it. With `outer_lr=1, outer_momentum=0` this
    is `ModelAveraging` bit for bit. Source: A. Douillard et al., *DiLoCo: Distributed Low-Communication Training of
    Language Models*, 2023, where the inner optimiser is AdamW.

    Args:
        optimizer, model, comm, buffers: as `Periodic`.
        communication_window: local steps per round (H); 500 in the paper.
        outer_lr: of the outer step; 0.7 in the paper.
        outer_momentum: of the outer step; 0.9 in the paper.

    Raises:
        As `Periodic`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: PositiveInt = 500,
        outer_lr: PositiveFloat = 0.7,
        outer_momentum: NonNegativeFloat = 0.9,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._lr, self._momentum = outer_lr, outer_momentum
        super().__init__(optimizer, model, **given(locals()))
        self._begun = self._flat()  # theta, where the window began
        self._velocity = np.zeros_like(self._begun)  # b
        self._velocity_foreseen = self._velocity

    def _next(self, mean: Flat) -> Flat:
        self._begun, self._velocity = self._outer_step(mean)
        self._velocity_foreseen = self._velocity
        return self._begun

    def _foreseen(self, mean: Flat) -> Flat:
        begun, self._velocity_foreseen = self._outer_step(mean)
        return begun

    def _outer_step(self, mean: Flat) -> tuple[Flat, Flat]:
        delta = self._begun - mean
        velocity = self._momentum * self._velocity + delta
        # theta - lr * (delta + momentum * b), written from the mean: a plain step of 1 then lands on it exactly.
        begun = (1 - self._lr) * delta - self._lr * self._momentum * velocity
        begun += mean
        return begun, velocity

    def common_state(self) -> dict[str, Flat]:
        return {"velocity": self._velocity_foreseen.copy()}

    def restore_common_state(self, saved: Mapping[str, Flat]) -> None:
        self._begun = self._flat()
        if "velocity" in saved:
            self._velocity = self._velocity_foreseen = saved["velocity"].copy()

    def own_state(self) -> dict[str, Flat]:
        return super().own_state() | {"begun": self._begun.copy(), "velocity": self._velocity.copy()}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        super().restore_own_state(saved)
        self._begun, self._velocity = saved["begun"].copy(), saved["velocity"].copy()
        self._velocity_foreseen = self._velocity
