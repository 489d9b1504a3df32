"""The worker's side, shared by all algorithms: local steps, and an exchange after each communication window.

An algorithm is a subclass with three formulas: what it commits (`_contribution`, `_commit`), and where the next local
steps start from (`_start_next`). `delta` and `locked` hold what most algorithms share of these. Nothing between the
constructor and `finish()` is a collective: no worker waits for another one, unless `max_clock_spread`, a warm start or
a replay asks for it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.optim import flat, validation
from mpidl.optim.flat import Flat
from mpidl.optim.flat_parameters import FlatParameters
from mpidl.parameter_server.center.center import Center, Requirements
from mpidl.parameter_server.worker import replay
from mpidl.parameter_server.worker.exchange import Client, Exchange
from mpidl.parameter_server.worker.overlap import Overlap
from mpidl.parameter_server.worker.statistics import Statistics


class Worker(FlatParameters):
    """Base of the asynchronous optimisers.

    The inner optimiser's state (momentum, moments) is this worker's own and is kept across pulls. A subclass declares
    its hyperparameters in the signature of its constructor, see `mpidl.optim.validation`.

    Args:
        optimizer, model, communication_window, max_clock_spread, comm, buffers: see `mpidl.Downpour`.
        overlap: local steps with which an exchange overlaps; 0: none does.
        own: further hyperparameters of the subclass.

    Raises:
        ArgumentError, DtypeError, MismatchError: see `mpidl.Downpour`; alike on all ranks.
    """

    _needs: ClassVar[Requirements] = Requirements()  # what else the center holds for this algorithm
    _sgd_without: ClassVar[tuple[str, ...] | None] = None  # the optimiser must be SGD, these of its settings unused

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int,
        max_clock_spread: int | None,
        comm: Communicator | None,
        buffers: str,
        overlap: int = 0,
        **own: Any,
    ) -> None:
        name, self._window_length, self._spread = type(self).__name__, communication_window, max_clock_spread
        common = {"communication_window": communication_window, "max_clock_spread": max_clock_spread}
        self._hyperparameters: dict[str, Any] = common | {"overlap": overlap, "buffers": buffers} | own
        error = validation.problem(type(self), self._hyperparameters)
        if error is None and self._sgd_without is not None:
            error = validation.plain_sgd(optimizer, name, unused=self._sgd_without)
        super().__init__(optimizer, model, comm=comm, buffers=buffers, error=error)
        self.statistics = Statistics()
        self._lay_out()
        self._start = self._flat()  # the local parameters at the last pull, as they were rounded to the model's dtype
        center = Center(self._ranks, self._start, name, self.comm.dedicated_servers, self._needs)
        self._client = Client(center, self._ranks, max_clock_spread, self._log, self.statistics)
        self._overlap = Overlap(name, overlap)
        self._steps = 0  # local steps since the last exchange
        self._last: tuple[int, Flat] | None = None  # clock and center at `finish()`
        self._last_sums: Flat | None = None
        self._last_own: dict[str, Flat] = {}
        self.stopping = False

    def _describe(self) -> dict[str, Any]:
        waits = self._spread is not None or bool(self._hyperparameters.get("warm_start"))
        self._log = replay.log_for(type(self).__name__, self._ranks.size, waits=waits)
        log = {} if self._log is None else {replay.VARIABLE: self._log.description}
        return self._hyperparameters | log

    @property
    def _center(self) -> Center:
        return self._client.center

    # What an algorithm is made of.

    def _local_step(self) -> None:
        """Moves the local parameters by this step's gradients."""
        self._inner.step()

    def _exchange_if_due(self) -> None:
        """Exchanges if enough local steps were taken."""
        if self._steps >= self._window_length:
            self._exchange()

    def _contribution(self, *, overlapped: bool) -> Any:
        """Returns what the local steps since the last commit came to, for `_commit` and `_start_next`.

        Args:
            overlapped: whether local steps go on while it is committed.
        """

    @abstractmethod
    def _commit(self, exchange: Exchange[Any]) -> None:
        """Commits what the contribution makes of the center, or refuses an infinity or a NaN.

        On the executor's thread, if the exchange overlaps with local steps: it then may not touch the parameters.
        """

    def _start_next(self, exchange: Exchange[Any]) -> None:
        """Makes the local parameters what the next local steps start from; the exchange has pulled."""
        assert exchange.center is not None
        self._start_from(exchange.center, given=True)

    def own_state(self) -> dict[str, Flat]:
        """Returns what this worker keeps between exchanges besides the inner optimiser's state, as flat arrays.

        After `finish()`: what it kept when all was committed and the center was not pulled yet.
        """
        if self._finished:
            return self._last_own
        self._await_exchange()
        return self._own()

    def _own(self) -> dict[str, Flat]:
        return {}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `own_state` returned; after `restore`, no collective."""

    # What the user calls.

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a local step; after `communication_window` of them, exchanges with the center.

        Raises:
            ArgumentError: a closure was given.
            ClosedError: `finish()` was called.
            RankFailedError: a thread of this process ended by an exception, or another rank has died.
        """
        self._refuse(closure)
        failed = exit_protocol.thread_failure()
        if failed is not None:  # no message of a step would tell the other ranks: the end of this rank does
            raise RankFailedError(f"rank {self._ranks.rank}: {failed}")
        self._local_step()
        self.statistics.steps += 1
        self._steps += 1
        self._exchange_if_due()

    def center(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Returns the clock and a copy of the center variable, by parameter name; one-sided, not a collective."""
        clock, pulled = self.snapshot()
        return clock, self.named(pulled)

    def snapshot(self) -> tuple[int, Flat]:
        """Returns the clock and a copy of the flat center, exact; one-sided. After `finish()`, as they were there."""
        if self._last is not None:
            return self._last
        self._await_exchange()
        pulled = self._new()
        return self._center.pull(pulled), pulled

    def sums(self) -> Flat | None:
        """Returns a copy of the sums that lie with the center (Adagrad's), flat, or None; one-sided."""
        if self._last is not None:
            return self._last_sums
        self._await_exchange()
        return self._center.sums()

    def restore(self, clock: int, center: Flat | None = None, sums: Flat | None = None) -> None:
        """Makes a run go on from a saved center; a collective before the first step.

        Args:
            clock: commits in the saved center.
            center: as `snapshot` gave it, if it is wider than the parameters, which the model holds already.
            sums: as `sums` gave them.
        """
        if self._ranks.rank == 0:
            self._center.restore(clock, None if center is None else center - self._start, sums)
        self._ranks.barrier("restoring the center")  # before it no worker may commit, nor pull
        self._pull()

    @property
    def exchanged(self) -> bool:
        """Whether this worker took no local step since its last exchange."""
        return self._steps == 0

    def request_stop(self) -> None:
        """Asks all workers to stop; each sees `stopping` become True at its next commit, or once that has ended."""
        self._client.stop_wished = True

    def finish(self) -> None:
        """Ends training; a collective, harmless the second time.

        Commits the steps since the last exchange, waits for all workers, and makes every rank's parameters the center.
        """
        if not self._finished:
            self._center.start_progress()  # it ended if an earlier finish() failed, and other ranks need it to pull
        try:
            super().finish()
        finally:  # also if it failed: no thread may go on
            self._overlap.end()
            self._center.end_progress()

    def _close(self) -> None:
        self._settle()
        if self._steps:
            self._exchange()
        self._client.ssp.leave()
        self._ranks.barrier("finish")  # after it every commit has landed: each rank flushed its own
        if self._client.replay is not None:
            self._client.replay.close()
        self._last_own, self._last_sums = self._own(), self._center.sums()
        self._last = self._pull()
        self._memory = flat.Memory(self._layout)  # what was kept goes
        self._center.close()

    # Exchanges.

    def _exchange(
        self, *, commits: bool = True, pulls: bool = True, overlapped: bool = False, bounded: bool = True
    ) -> Exchange[Any]:
        """Makes an exchange and takes over what it pulled, or has it begin, if it overlaps with local steps.

        Args:
            commits: whether the contribution is committed.
            pulls: whether the center is pulled.
            overlapped: whether the executor's thread makes it, unless there is nothing to commit that it could hide.
            bounded: whether `max_clock_spread` holds for it.
        """
        self._await_exchange()
        with self.statistics.communicating():
            contribution = self._contribution(overlapped=overlapped) if commits else None
            out = self._take() if pulls else None
            exchange = Exchange(self._client, self._client.seen, contribution, out, bounded=bounded)
            commit = self._commit if commits else None
            self._center.look()
            waited = not overlapped or (commits and contribution is None)
            if waited:
                exchange.run(commit)
                self._account(exchange)
            else:
                self._overlap.start(exchange, commit)
            if commits:
                self._steps, self._client.seen = 0, self._client.seen.window_begun()
            if waited:
                self._take_over(exchange)
        return exchange

    def _await_exchange(self) -> None:
        """Waits for an exchange that is under way, and counts it."""
        with self.statistics.communicating():
            exchange = self._overlap.wait(self._center.look)
            if exchange is not None:
                self._account(exchange)

    def _settle(self) -> None:
        """Waits for an exchange that is under way, and takes over what was pulled."""
        self._await_exchange()
        exchange = self._overlap.take()
        if exchange is not None:
            with self.statistics.communicating():
                self._take_over(exchange)

    def _take_over(self, exchange: Exchange[Any]) -> None:
        if exchange.center is not None:
            self._start_next(exchange)
            self._client.took_over(exchange.seen.others, window_begins=self._steps == 0)

    def _account(self, exchange: Exchange[Any]) -> None:
        self._client.account(exchange)
        self.stopping = exchange.stopping

    def _pull(self) -> tuple[int, Flat]:
        """Makes the local parameters the center; returns its clock and the center, which may be wider than they are."""
        pulled = self._new()
        clock = self._center.pull(pulled)
        self.statistics.bytes += pulled.nbytes
        self._start_from(pulled)
        self._client.took_over(self._client.seen.pulled(clock).others, window_begins=self._steps == 0)
        return clock, pulled

    def _start_from(self, values: Flat, *, given: bool = False) -> None:
        """Gives the local parameters these values.

        Args:
            values: from `flat.new` or `flat.pack`.
            given: whether the caller does not use them any more.
        """
        views, before = self._views(), self._start
        flat.unpack(self._layout, values, views)
        if given and flat.is_whole(self._layout, views):
            self._start = values
        else:  # local steps start from what is rounded to the model's dtype; only what they move is committed
            self._start = self._flat()
        self._give_back(before, *([values] if given and self._start is not values else []))
