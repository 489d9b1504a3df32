"""DC-ASGD: a delayed gradient is corrected, to first order, by what the center has moved meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeFloat, NonNegativeInt, PositiveInt, given
from mpidl.parameter_server.worker import sgd
from mpidl.parameter_server.worker.locked import LockedWorker


class DCASGD(LockedWorker):
    """Commits -eta * (g + lambda g*g*(w_t - w_bak)): g*g stands for the diagonal of the Hessian.

    w_t is the center at the commit, w_bak what this worker last read of it: one backup per worker, kept by the worker,
    where MXNet's code keeps one for all. eta and the momentum are those of the optimiser; with momentum the worker
    commits v = momentum * v - eta * (...). With `lambda_=0` and no momentum this is `Downpour` over plain SGD. After a
    longer window g is the sum of its gradients. Source: S. Zheng et al., *Asynchronous Stochastic Gradient Descent with
    Delay Compensation*, ICML 2017, with the constant lambda (DC-ASGD-c).

    Args:
        optimizer: a torch.optim.SGD without dampening and nesterov, holding parameters of `model` only; its lr and
            momentum are those of the rule.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            The center starts from them.
        communication_window: local steps per exchange, 1 or more; 1 by default, as in the paper.
        lambda_: strength of the correction, 0 or more; 0.04 by default, as in MXNet's code.
        max_clock_spread: exchanges that a worker may be ahead of the slowest one (SSP); None, the default: any number.
        comm: the ranks that train together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean", the default, averages BatchNorm statistics and other floating buffers in `finish()`; "local"
            leaves them.

    Raises:
        ArgumentError: another optimiser; optimiser and model do not belong together, or an argument cannot work; alike
            on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """

    _sgd_without: ClassVar[tuple[str, ...] | None] = ("dampening", "nesterov", "maximize")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 1,
        lambda_: NonNegativeFloat = 0.04,
        max_clock_spread: NonNegativeInt | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._lambda = lambda_
        self._move = self._correction = np.empty(0)  # of an exchange
        self._velocity: Flat | None = None
        super().__init__(optimizer, model, **given(locals()))

    def _local_step(self) -> None:
        """Moves by -eta g; the momentum comes in when the gradient has been corrected."""
        with sgd.stepping_with(self._inner, momentum=0.0):
            self._step_inner()

    def _prepare(self, reached: Flat) -> None:
        self._move = reached - self._start  # -eta g
        rates, momenta = (sgd.of_each(self._inner, self._held, key) for key in ("lr", "momentum"))
        self._correction = self._move * self._move  # eta^2 g*g
        for slot, rate in zip(self._layout.slots, rates, strict=True):
            self._correction[slot.offset : slot.offset + slot.count] *= self._lambda / rate if rate else 0.0
        if not any(momenta):
            self._velocity = None
        else:
            self._velocity = np.zeros_like(reached) if self._velocity is None else self._velocity
            for slot, momentum in zip(self._layout.slots, momenta, strict=True):
                self._velocity[slot.offset : slot.offset + slot.count] *= momentum

    def _change(self, here: slice, reached: Flat, center: Flat) -> Flat:
        behind = center - self._start[here]
        if self._velocity is None and not behind.any():
            exact: Flat = reached[here].copy()  # start + (reached - start) would round
            return exact
        step = self._move[here] - self._correction[here] * behind
        if self._velocity is not None:
            self._velocity[here] += step
            step = self._velocity[here]
        changed: Flat = center + step
        return changed

    def _own(self) -> dict[str, Flat]:
        return {} if self._velocity is None else {"velocity": self._velocity.copy()}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        self._velocity = saved["velocity"].copy() if "velocity" in saved else None
