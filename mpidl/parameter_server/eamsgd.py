"""EAMSGD: elastic averaging with Nesterov's momentum in the local steps."""

from __future__ import annotations

from typing import ClassVar

import torch

from mpidl.optim import flat
from mpidl.optim.flat import Flat
from mpidl.parameter_server.aeasgd import AEASGD
from mpidl.parameter_server.worker import sgd


class EAMSGD(AEASGD):
    """Local steps v = delta v - eta g(x + delta v), x += v, and the elastic exchange of `AEASGD` on x.

    eta and delta are the optimiser's lr and momentum (the paper uses 0.99); with momentum 0 this is `AEASGD` bit for
    bit. The model's parameters are x + delta v, where the paper takes the gradient, and the steps are those of torch's
    Nesterov SGD, which are the same ones: its momentum buffer is -v / eta, so that a new learning rate scales v too.
    Source: S. Zhang, A. Choromanska, Y. LeCun, *Deep learning with Elastic Averaging SGD*, NIPS 2015, Algorithm 2.

    Args:
        optimizer: a torch.optim.SGD without dampening, holding parameters of `model` only; its lr and momentum are eta
            and delta. Nesterov's form is used whether its flag is set or not.
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
        ArgumentError: another optimiser; alpha is above 1, or one of `rho` and `learning_rate` is missing; optimiser
            and model do not belong together, or an argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """

    _sgd_without: ClassVar[tuple[str, ...] | None] = ("dampening", "maximize")

    def _take_step(self) -> None:
        with sgd.stepping_with(self._inner, nesterov=True):
            self._step_inner()

    def _reached(self) -> Flat:
        """Returns x, which lies behind the model's parameters by delta v = -delta * eta * buffer."""
        reached, ahead = self._flat(), self._ahead()
        if ahead is not None:
            reached -= ahead
        return reached

    def _go_on(self, reached: Flat, center: Flat) -> None:
        reached -= self._elastic
        ahead = self._ahead()
        if ahead is not None:
            reached += ahead
        self._start_from(reached, given=True)
        self._give_back(center)

    def _ahead(self) -> Flat | None:
        """Returns delta v, flat; None where there is no momentum."""
        rates, momenta = (sgd.of_each(self._inner, self._held, key) for key in ("lr", "momentum"))
        if not any(momenta):
            return None
        buffers = [self._inner.state[p].get("momentum_buffer") for _, p in self._held]
        terms = [
            torch.zeros_like(p) if buffer is None else buffer * (-momentum * rate)
            for (_, p), buffer, rate, momentum in zip(self._held, buffers, rates, momenta, strict=True)
        ]
        ordered = [term.detach().permute(order) for term, order in zip(terms, self._orders, strict=True)]
        return flat.pack(self._layout, ordered)
