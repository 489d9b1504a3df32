"""DistBelief: Dean's own Downpour SGD. Workers push gradients, and the server's Adagrad makes steps of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.mpi.executor import Executor, Future
from mpidl.optim import flat, validation
from mpidl.optim.flat import Flat
from mpidl.parameter_server.center.center import Beside
from mpidl.parameter_server.worker import overlap as overlapping
from mpidl.parameter_server.worker import sgd
from mpidl.parameter_server.worker.base import Worker
from mpidl.parameter_server.worker.warm_start import WarmStart


@dataclass(frozen=True)
class _Done:
    """What the thread did in one turn."""

    gradient: Flat | None  # pushed, unless it was refused; None: only fetched
    base: int  # others' commits that the oldest gradient in it knew of
    number: int | None  # of the commit
    center: Flat | None  # fetched
    clock: int  # of the center
    stopping: bool


class DistBelief(Worker):
    """Pushes the sum of the local steps' gradients g; the center moves by -gamma * g / sqrt(sum of all pushed g*g).

    A worker steps with its own optimiser in between: parameters -= lr * g. Every `n_push` steps it pushes, every
    `n_fetch` steps its parameters become the center. The sums of squares lie beside the center; adding to one and
    reading what it was is one step for each element, so that every push is counted in some order of them. As in the
    paper there is no epsilon: the first gradient of an element moves it by exactly gamma; one that is 0 moves nothing.
    Push and fetch are done in the step in which they fall due, the push first; with `overlap` by a thread, as in the
    paper, while local steps go on. A push is as stale as the oldest gradient in it. Source: J. Dean et al., *Large
    Scale Distributed Deep Networks*, NIPS 2012, section 4.1 and appendix.

    Args:
        optimizer: a torch.optim.SGD, which takes the local steps.
        model, max_clock_spread, comm, buffers: as `Worker`.
        communication_window: local steps per push and per fetch; 1 as in the paper's experiments.
        n_push: local steps per push, if not `communication_window`.
        n_fetch: local steps per fetch, if not `communication_window`.
        gamma: Adagrad's rate; the paper names none, 0.01 is torch's.
        warm_start: rank 0 trains so many steps alone before the others begin.
        overlap: local steps after which parameters become what was fetched, at most `n_fetch`; the moves of these steps
            are given up then, but not their gradients. A push that falls due waits for the one before. 0: nothing is
            done by a thread, nor is it in a warm start. Needs an MPI with threads (THREAD_MULTIPLE).

    Raises:
        ArgumentError: another optimiser; `overlap` together with `max_clock_spread`; or as `Worker`.
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
        overlap: int = 0,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        n_push, n_fetch = (communication_window if n is None else n for n in (n_push, n_fetch))
        self._gamma, self._n_push, self._n_fetch, self._overlap = gamma, n_push, n_fetch, overlap
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=validation.plain_sgd(optimizer, "DistBelief", unused=("maximize",))
            or validation.whole("n_push", n_push, least=1)
            or validation.whole("n_fetch", n_fetch, least=1)
            or validation.positive("gamma", gamma)
            or validation.whole("warm_start", warm_start, least=0)
            or validation.whole("overlap", overlap, least=0),
            hyperparameters={
                **{"n_push": n_push, "n_fetch": n_fetch, "gamma": gamma},
                **{"warm_start": warm_start, "overlap": overlap},
            },
        )
        self._accrued = np.zeros_like(self._start)
        self._since_fetch = 0  # local steps
        self._commits = 0  # of its own, refused ones left out
        self._others = self._clock  # others' commits that the parameters know of
        self._base = self._clock  # and those that the oldest gradient does, of what is pushed next
        self._executor = Executor(type(self).__name__) if overlap else None
        self._under_way: Future[_Done] | None = None
        self._awaited = False  # whether a fetch was begun and is not taken over yet
        self._fetched: tuple[Flat, int, int] | None = None  # center, clock, others' commits in it; not yet taken over
        first = self._ranks.rank == 0
        self._warm = WarmStart(warm_start, model, self._server.clock, self._server.look, self._pull, leads=first)

    def _describe(self) -> dict[str, Any]:
        overlapping.check(self._overlap, "n_fetch", self._n_fetch, self._spread)
        return super()._describe()

    def _local_step(self) -> None:
        self._warm.join()  # a model whose forward was not called did not wait there
        if self._steps == 0:
            self._base = self._others
        self._accrued += self._gradients()
        self._inner.step()
        self._since_fetch += 1

    def _exchange_if_due(self) -> None:
        if self._awaited and self._since_fetch >= self._overlap:
            self._settle()
        push, fetch = self._steps >= self._n_push, self._since_fetch >= self._n_fetch
        if (push or fetch) and self._executor is not None and not self._warm.leading:
            self._begin_beside(self._executor, push=push, fetch=fetch)
        elif push or fetch:
            started = time.perf_counter()
            with self._turn():
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
        gradient = self._take_accrued()
        self._count(self._commit_sum(gradient), gradient, self._base)

    def _take_accrued(self) -> Flat:
        gradient, self._accrued = self._accrued, np.zeros_like(self._accrued)
        return gradient

    def _commit_sum(self, gradient: Flat) -> int | None:
        """Returns the commit's number; None: it was not made, since it held an infinity or a NaN."""
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            squares = gradient * gradient
        if not np.isfinite(squares).all():
            return None
        number = self._server.clock.begin()
        sums = self._server.add_to_sums(squares)
        sums += squares
        np.sqrt(sums, out=sums)
        # A quotient of 1 first, so that the first move is gamma to the last bit; where no gradient ever was, no move.
        delta = np.divide(gradient, sums, out=np.zeros_like(gradient), where=sums > 0)
        delta *= -self._gamma
        return self._server.commit(delta, number=number)

    def _count(self, number: int | None, gradient: Flat, base: int) -> None:
        if number is None:
            self._refuse_commit()
            return
        self._count_commit(number - self._commits - base, 2 * gradient.nbytes)
        self._commits += 1

    def _pull(self) -> tuple[int, Flat]:
        self._since_fetch = 0
        pulled = super()._pull()
        self._others = self._clock - self._commits
        return pulled

    def _begin_beside(self, executor: Executor, *, push: bool, fetch: bool) -> None:
        """Lets the thread push and fetch, after what it was asked for before."""
        self._await_exchange()
        started = time.perf_counter()
        self._server.look()
        gradient, base = self._take_accrued() if push else None, self._base
        center = self._take() if fetch else None
        self._under_way = executor.start(lambda: self._exchange_beside(gradient, base, center))
        if push:
            self._steps = 0
        if fetch:
            self._since_fetch, self._awaited = 0, True
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _exchange_beside(self, gradient: Flat | None, base: int, center: Flat | None) -> _Done:
        """What the thread does; meanwhile nobody else uses the server."""
        with self._turn():
            self._pass_wish_on()
            number = None if gradient is None else self._commit_sum(gradient)
            clock = 0 if center is None else self._server.pull(center)
            return _Done(gradient, base, number, center, clock, self._server.clock.stop_requested())

    def _await_exchange(self) -> None:
        future = self._under_way
        if future is None:
            return
        started = time.perf_counter()
        try:
            done = future.wait(self._server.look)
            self._under_way = None
        finally:
            if future.failed:  # one whose wait is broken off goes on
                self._under_way = None
        self.statistics.seconds_communicating += time.perf_counter() - started
        self.stopping = done.stopping
        if done.gradient is not None:
            self._count(done.number, done.gradient, done.base)
        if done.center is not None:
            self._fetched = done.center, done.clock, done.clock - self._commits

    def _settle(self) -> None:
        self._await_exchange()
        if self._fetched is None:
            return
        started = time.perf_counter()
        (center, self._clock, self._others), self._fetched, self._awaited = self._fetched, None, False
        self.statistics.bytes += center.nbytes
        self._start_from(center, given=True)
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _end_threads(self) -> None:
        if self._executor is not None:
            self._executor.end()
        super()._end_threads()

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
        parameters = self._flat() if self._fetched is None else self._fetched[0].copy()
        return {"parameters": parameters, "since_fetch": np.array([self._since_fetch])}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        if "parameters" in saved:
            self._start_from(self._like(saved["parameters"]))
            self._since_fetch = int(saved["since_fetch"][0])

    def _close(self) -> None:
        self._warm.end()
        super()._close()
