"""GEM, gradient energy matching: all workers together move the center as momentum SGD would."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim import validation
from mpidl.optim.flat import Flat
from mpidl.parameter_server.worker import sgd
from mpidl.parameter_server.worker.base import Worker

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
        optimizer: a torch.optim.SGD without dampening and nesterov.
        model, max_clock_spread, comm, buffers: as `Worker`.
        communication_window: local steps per exchange; 1 in the paper.
        kappa: amplifies the proxy; the paper calls 1 to 2 good, 4 divergent.
        epsilon: keeps the ratio finite where nothing moves.

    Raises:
        ArgumentError: another optimiser; or as `Worker`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 1,
        kappa: float = 1.0,
        epsilon: float = 1e-12,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._kappa, self._epsilon = kappa, epsilon
        unused = ("dampening", "nesterov", "maximize")
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=validation.plain_sgd(optimizer, "GEM", unused=unused)
            or validation.positive("kappa", kappa)
            or validation.positive("epsilon", epsilon),
            hyperparameters={"kappa": kappa, "epsilon": epsilon},
        )
        self._proxy = np.zeros_like(self._start)  # m
        self._read = self._start.copy()  # s, exact where the model's dtype is narrower
        self._unseen = 0  # own commits that the last pull missed: they are no staleness

    def _local_step(self) -> None:
        with sgd.stepping_with(self._inner, momentum=0.0):
            self._inner.step()

    def _commit(self) -> None:
        moved = self._flat() - self._start
        now = self._new()
        clock = self._server.pull(now)
        delta = self._matched(moved, now) if np.isfinite(moved).all() else moved
        unseen = 0
        if np.isfinite(delta).all():
            number = self._server.commit(delta)
            self._count_commit(number - self._clock - self._unseen, 2 * delta.nbytes)
            unseen = 1
        else:
            self._refuse_commit()
        self._clock, self._unseen = clock, unseen
        self._begin_from(now)

    def _fetch(self) -> None:
        """Nothing: the center was read before the commit."""

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

    def _pull(self) -> tuple[int, Flat]:
        clock, center = super()._pull()
        self._read, self._unseen = center, 0
        return clock, center

    def _own(self) -> dict[str, Flat]:
        where = np.array([self._clock, self._unseen])
        return {"proxy": self._proxy.copy(), "read": self._read.copy(), "where": where}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        if "proxy" in saved:
            self._proxy = self._like(saved["proxy"])
            self._begin_from(self._like(saved["read"]))
            self._clock, self._unseen = (int(word) for word in saved["where"])
