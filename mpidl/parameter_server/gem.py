"""GEM, gradient energy matching: all workers together move the center as momentum SGD would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeInt, PositiveFloat, PositiveInt, given
from mpidl.parameter_server.worker import sgd
from mpidl.parameter_server.worker.base import Worker
from mpidl.parameter_server.worker.exchange import Exchange

_CLAMP = (0.0, 5.0)  # of pi, in the authors' code; without the lower bound it diverges from about 5 workers on


class GEM(Worker):
    """Commits pi * Delta with pi = (kappa |m| - |theta - s|) / (|Delta| + epsilon), held within 0 and 5.

    Delta = -eta g is the local move from s, the center that was read before; theta is the center now, and m the
    worker's own momentum m = mu m + Delta, its proxy of how fast the center should move: what the others have moved
    already, |theta - s|, is left out. The worker goes on from theta, which misses its own commit. eta and mu are the
    optimiser's lr and momentum (paper: 0.01, 0.9). After a longer window Delta is the sum of its steps. Source:
    J. Hermans, G. Louppe, *Gradient Energy Matching for Distributed Asynchronous Gradient Descent*, 2018, Algorithm 1,
    Eq. 27 for kappa; the bounds, and an epsilon of 1e-12, are those of its code.

    Args:
        optimizer: a torch.optim.SGD without dampening and nesterov, holding parameters of `model` only; its lr and
            momentum are eta and mu.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            The center starts from them.
        communication_window: local steps per exchange, 1 or more; 1 by default, as in the paper.
        kappa: amplifies the worker's momentum, above 0; 1 by default; the paper calls 1 to 2 good, 4 divergent.
        epsilon: keeps the ratio finite where nothing moves, above 0; 1e-12 by default.
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
        kappa: PositiveFloat = 1.0,
        epsilon: PositiveFloat = 1e-12,
        max_clock_spread: NonNegativeInt | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._kappa, self._epsilon = kappa, epsilon
        super().__init__(optimizer, model, **given(locals()))
        self._proxy = np.zeros_like(self._start)  # m
        self._read = self._start.copy()  # s, exact where the model's dtype is narrower

    def _local_step(self) -> None:
        with sgd.stepping_with(self._inner, momentum=0.0):
            self._step_inner()

    def _contribution(self, *, overlapped: bool) -> Flat:
        """Returns Delta."""
        moved = self._flat()
        moved -= self._start
        return moved

    def _commit(self, exchange: Exchange[Flat]) -> None:
        moved, now = exchange.contribution, exchange.pull()  # first: the worker goes on without its own commit
        delta = self._matched(moved, now) if np.isfinite(moved).all() else moved
        if np.isfinite(delta).all():
            exchange.commit(delta)
        else:
            exchange.refuse()

    def _start_next(self, exchange: Exchange[Flat]) -> None:
        assert exchange.center is not None
        self._begin_from(exchange.center)
        self._give_back(exchange.contribution)

    def _matched(self, moved: Flat, now: Flat) -> Flat:
        """Returns pi * Delta, and moves the proxy on."""
        momenta = sgd.of_each(self._inner, self._held, "momentum")
        for slot, momentum in zip(self._layout.slots, momenta, strict=True):
            self._proxy[slot.offset : slot.offset + slot.count] *= momentum
        self._proxy += moved
        ratio = np.abs(self._proxy)
        ratio *= self._kappa
        ratio -= np.abs(now - self._read)
        ratio /= np.abs(moved) + self._epsilon
        np.clip(ratio, *_CLAMP, out=ratio)
        ratio *= moved
        return ratio

    def _begin_from(self, center: Flat) -> None:
        self._start_from(center)
        self._read = center

    def _start_anew(self, values: Flat) -> None:
        self._read = values.copy()
        super()._start_anew(values)

    def _pull(self) -> tuple[int, Flat]:
        clock, self._read = super()._pull()
        return clock, self._read

    def _own(self) -> dict[str, Flat]:
        seen = self._client.seen
        where = np.array([seen.own + seen.others])  # a worker that goes on knows both as commits of an earlier part
        return {"proxy": self._proxy.copy(), "read": self._read.copy(), "where": where}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        if "proxy" in saved:
            self._proxy = self._like(saved["proxy"])
            self._begin_from(self._like(saved["read"]))
            self._client.took_over(int(saved["where"].sum()), window_begins=True)
