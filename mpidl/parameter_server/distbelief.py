"""DistBelief: Dean's own Downpour SGD. Workers push gradients, and the server's Adagrad makes steps of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from mpidl import checks, flat
from mpidl.communicator import Communicator
from mpidl.flat import Flat
from mpidl.parameter_server import sgd
from mpidl.parameter_server.server import Beside
from mpidl.parameter_server.warm_start import WarmStart
from mpidl.parameter_server.worker import Worker


class DistBelief(Worker):
    """Pushes the sum of the local steps' gradients g; the center moves by -gamma * g / sqrt(sum of all pushed g*g).

    A worker steps with its own optimiser in between: parameters -= lr * g. Every `n_push` steps it pushes, every
    `n_fetch` steps its parameters become the center. The sums of squares lie beside the center; adding to one and
    reading what it was is one step for each element, so that every push is counted in some order of them. As in the
    paper there is no epsilon: the first gradient of an element moves it by exactly gamma; one that is 0 moves nothing.
    Push and fetch are done in the step in which they fall due, the push first; in the paper threads of their own did
    them. Source: J. Dean et al., *Large Scale Distributed Deep Networks*, NIPS 2012, section 4.1 and appendix.

    Args:
        optimizer: a torch.optim.SGD, which takes the local steps.
        model, max_clock_spread, comm, buffers: as `Worker`.
        communication_window: local steps per push and per fetch; 1 as in the paper's experiments.
        n_push: local steps per push, if not `communication_window`.
        n_fetch: local steps per fetch, if not `communication_window`.
        gamma: Adagrad's rate; the paper names none, 0.01 is torch's.
        warm_start: rank 0 trains so many steps alone before the others begin.

    Raises:
        ArgumentError: another optimiser; or as `Worker`.
    """

    _beside: ClassVar[Beside] = Beside(sums=True)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 1,
        n_push: int | None = None,
        n_fetch: int | None = None,
        gamma: float = 0.01,
        warm_start: int = 0,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        n_push, n_fetch = (communication_window if n is None else n for n in (n_push, n_fetch))
        self._gamma, self._n_push, self._n_fetch = gamma, n_push, n_fetch
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=checks.plain_sgd(optimizer, "DistBelief", unused=("maximize",))
            or checks.whole("n_push", n_push, least=1)
            or checks.whole("n_fetch", n_fetch, least=1)
            or checks.positive("gamma", gamma)
            or checks.whole("warm_start", warm_start, least=0),
            hyperparameters={"n_push": n_push, "n_fetch": n_fetch, "gamma": gamma, "warm_start": warm_start},
        )
        self._accrued = np.zeros_like(self._start)
        self._since_fetch = 0  # local steps
        first = self._ranks.rank == 0
        self._warm = WarmStart(warm_start, model, self._server.clock, self._server.look, self._pull, leads=first)

    def _local_step(self) -> None:
        self._warm.join()  # a model whose forward was not called did not wait there
        self._accrued += self._gradients()
        self._inner.step()
        self._since_fetch += 1

    def _exchange_if_due(self) -> None:
        push, fetch = self._steps == self._n_push, self._since_fetch == self._n_fetch
        if push or fetch:
            with self._turn():
                started = time.perf_counter()
                self._meet()
                if push:
                    self._push(fetch)
                elif fetch:
                    self._fetch()
                self._after_exchange(started)
        self._warm.step()

    def _push(self, fetch: bool) -> None:
        paced = not self._warm.leading  # who leads a warm start cannot wait for those who wait for it
        if paced:
            self._pace.before_commit()
        self._commit()
        self._steps = 0
        if paced:
            self._pace.after_commit()
        if fetch:
            self._fetch()
        if paced:
            self._pace.after_pull()

    def _commit(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            squares = self._accrued * self._accrued
        gradient, self._accrued = self._accrued, np.zeros_like(self._accrued)
        if not np.isfinite(squares).all():
            self._refuse_commit()
            return
        number = self._server.clock.begin()
        sums = self._server.add_to_sums(squares)
        sums += squares
        np.sqrt(sums, out=sums)
        # A quotient of 1 first, so that the first move is gamma to the last bit; where no gradient ever was, no move.
        delta = np.divide(gradient, sums, out=np.zeros_like(gradient), where=sums > 0)
        delta *= -self._gamma
        self._server.commit(delta, number=number)
        self._count_commit(number - self._clock, 2 * delta.nbytes)

    def _pull(self) -> tuple[int, Flat]:
        self._since_fetch = 0
        return super()._pull()

    def _gradients(self) -> Flat:
        """Returns this step's gradients, flat, weight decay included; 0 for a parameter that was not used."""
        decays = sgd.of_each(self._inner, self._held, "weight_decay")
        found = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self._held]
        found = [
            g.detach() if not decay else g.detach().add(p.detach(), alpha=decay)
            for g, decay, (_, p) in zip(found, decays, self._held, strict=True)
        ]
        ordered = [g.permute(order).contiguous() for g, order in zip(found, self._orders, strict=True)]
        return flat.pack(self._layout, ordered)

    def restore(self, clock: int, center: Flat | None = None, sums: Flat | None = None) -> None:
        """As `Worker`; a warm start of the earlier part is not repeated."""
        super().restore(clock, center, sums)
        if clock:
            self._warm.end()

    def _own(self) -> dict[str, Any]:
        if not self._since_fetch:
            return {}
        return {"parameters": self._flat(), "since_fetch": np.array([self._since_fetch])}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        if "parameters" in saved:
            self._start_from(self._like(saved["parameters"]))
            self._since_fetch = int(saved["since_fetch"][0])

    def _close(self) -> None:
        self._warm.end()
        super()._close()
