"""EAMSGD: elastic averaging with Nesterov's momentum in the local steps."""

from __future__ import annotations

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim import flat, validation
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
        optimizer: a torch.optim.SGD without dampening. Nesterov's form is used whether its flag is set or not.
        others: as `AEASGD`.

    Raises:
        ArgumentError: another optimiser; or as `AEASGD`.
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
    ) -> None:
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            beta=beta,
            rho=rho,
            learning_rate=learning_rate,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=validation.plain_sgd(optimizer, "EAMSGD", unused=("dampening", "maximize")),
        )

    def _take_step(self) -> None:
        with sgd.stepping_with(self._inner, nesterov=True):
            self._inner.step()

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
