"""The worker's side, shared by all algorithms: local steps, and an exchange after each communication window.

An algorithm is a subclass that says how it commits and pulls. `delta` and `locked` are the two ways that most share.
Nothing between the constructor and `finish()` is a collective: no worker waits for another, unless `max_clock_spread`
or a warm start asks for it.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.optim import flat, validation
from mpidl.optim.flat import Flat
from mpidl.optim.flat_parameters import FlatParameters
from mpidl.parameter_server.center.center import Beside, Center
from mpidl.parameter_server.worker import replay
from mpidl.parameter_server.worker.replay import Replay
from mpidl.parameter_server.worker.ssp import SSP
from mpidl.parameter_server.worker.statistics import Statistics


class Worker(FlatParameters):
    """Base of the asynchronous optimisers.

    The inner optimiser's state (momentum, moments) is this worker's own and is kept across pulls.

    Args:
        optimizer: takes the local steps; holds parameters of `model` only. Hyperparameters may differ between ranks.
        model: parameters and buffers are broadcast from rank 0, in place; the center starts from them.
        communication_window: local steps per exchange.
        max_clock_spread: no worker is more than so many exchanges ahead of the slowest (SSP, Ho et al. 2013); with 0
            they go in rounds. None: nobody waits for anybody.
        comm: who trains together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean" averages BatchNorm statistics and other floating buffers in `finish()`; "local" leaves them.
        error: what a subclass found wrong with its own arguments.
        hyperparameters: a subclass' own, by name; alike on all ranks.

    Raises:
        ArgumentError: optimiser and model do not belong together, or an argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """

    _beside: ClassVar[Beside] = Beside()  # what the server holds for this algorithm

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 5,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
        error: Exception | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._window_length, self._spread = communication_window, max_clock_spread
        self._hyperparameters = dict(hyperparameters or {})
        error = (
            validation.whole("communication_window", communication_window, least=1)
            or (None if max_clock_spread is None else validation.whole("max_clock_spread", max_clock_spread, least=0))
            or error
        )
        super().__init__(optimizer, model, comm=comm, buffers=buffers, error=error)
        self.statistics = Statistics()
        self._lay_out()
        self._start = self._flat()  # the local parameters at the last pull, as they were rounded to the model's dtype
        self._server = Center(self._ranks, self._start, type(self).__name__, self.comm.dedicated_servers, self._beside)
        look = self._server.look
        self._replay = None if self._log is None else Replay(self._log, self._server.clock, self._ranks, look)
        self._pace = SSP(self._server.clock, max_clock_spread, self._server.look)
        self._clock = 0  # at the last pull
        self._steps = 0  # local steps since the last exchange
        self._last: tuple[int, Flat] | None = None  # clock and center at `finish()`
        self._last_sums: Flat | None = None
        self._last_own: dict[str, Flat] = {}
        self._stop_wished = False
        self.stopping = False

    def _describe(self) -> dict[str, Any]:
        waits = self._spread is not None or bool(self._hyperparameters.get("warm_start"))
        self._log = replay.log_for(type(self).__name__, self._ranks.size, waits=waits)
        own = {"communication_window": self._window_length, "max_clock_spread": self._spread, "buffers": self._buffers}
        log = {} if self._log is None else {replay.VARIABLE: self._log.description}
        return own | self._hyperparameters | log

    # What an algorithm is made of.

    def _local_step(self) -> None:
        """Moves the local parameters by this step's gradients."""
        self._inner.step()

    def _exchange_if_due(self) -> None:
        """Exchanges if enough local steps were taken."""
        if self._steps >= self._window_length:
            self._exchange()

    @abstractmethod
    def _commit(self) -> None:
        """Sends what `self._steps` local steps came to, unless it holds an infinity or a NaN."""

    def _fetch(self) -> None:
        """Makes the local parameters what the next window starts from, if `_commit` did not."""
        self._pull()

    def _await_exchange(self) -> None:
        """Waits for an exchange that is under way; most rules have none."""

    def _settle(self) -> None:
        """Waits for it, and lets it change the parameters."""

    def own_state(self) -> dict[str, Flat]:
        """Returns what this worker keeps between exchanges besides the inner optimiser's state, as flat arrays.

        After `finish()`, what it was when all was committed and the center not yet pulled.
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
        if failed is not None:  # there is no step header here that would tell the others: ending this rank does
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
        return self._server.pull(pulled), pulled

    def sums(self) -> Flat | None:
        """Returns a copy of what lies beside the center (Adagrad's sums), flat, or None; one-sided."""
        if self._last is not None:
            return self._last_sums
        self._await_exchange()
        return self._server.sums()

    def restore(self, clock: int, center: Flat | None = None, sums: Flat | None = None) -> None:
        """Makes a run go on from a saved center; a collective before the first step.

        Args:
            clock: how many commits are in it.
            center: as `snapshot` gave it, if it is wider than the parameters, which the model holds already.
            sums: as `sums` gave them.
        """
        if self._ranks.rank == 0:
            self._server.restore(clock, None if center is None else center - self._start, sums)
        self._ranks.barrier("restoring the center")  # nobody may commit before, nor pull
        self._pull()

    @property
    def exchanged(self) -> bool:
        """Whether this worker took no local step since its last exchange."""
        return self._steps == 0

    def request_stop(self) -> None:
        """Asks all workers to stop; each sees `stopping` become True at its next commit, or once that has ended."""
        self._stop_wished = True

    def finish(self) -> None:
        """Ends training; a collective, harmless the second time.

        The steps since the last exchange are committed, all workers are waited for, and every rank's parameters become
        the center as it then is.
        """
        try:
            super().finish()
        finally:
            self._end_threads()  # also if it failed: none may go on

    def _end_threads(self) -> None:
        self._server.end_progress()

    def _close(self) -> None:
        self._settle()
        if self._steps:
            self._exchange()
            self._settle()
        self._pace.leave()
        self._ranks.barrier("finish")  # after it every commit has landed: each rank flushed its own
        if self._replay is not None:
            self._replay.close()
        self._last_own, self._last_sums = self._own(), self._server.sums()
        self._last = self._pull()
        self._memory = flat.Memory(self._layout)  # what was kept goes
        self._server.close()

    # What algorithms share.

    def _exchange(self) -> None:
        with self._turn():
            self._exchange_now()

    def _turn(self) -> AbstractContextManager[None]:
        """Makes others wait with their exchanges, if the run is one that can be repeated."""
        return nullcontext() if self._replay is None else self._replay.turn()

    def _exchange_now(self) -> None:
        started = time.perf_counter()
        self._meet()
        self._pace.before_commit()
        self._commit()
        self._pace.after_commit()
        self._fetch()
        self._pace.after_pull()
        self._steps = 0
        self._after_exchange(started)

    def _meet(self) -> None:
        """Begins an exchange: looks for the dead, passes a wish to stop on."""
        self._server.look()
        self._pass_wish_on()

    def _pass_wish_on(self) -> None:
        if self._stop_wished:
            self._server.clock.request_stop()
            self._stop_wished = False

    def _after_exchange(self, started: float) -> None:
        """Ends an exchange that began at `started`, of time.perf_counter()."""
        self.stopping = self._server.clock.stop_requested()
        self.statistics.seconds_waiting += self._pace.take_seconds()
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _count_commit(self, staleness: int, nbytes: int) -> None:
        self.statistics.commits += 1
        self.statistics.staleness[staleness] += 1
        self.statistics.bytes += nbytes

    def _refuse_commit(self) -> None:
        """Keeps an infinity or a NaN out of the center, where it would reach everybody; says so the first time."""
        self.statistics.refused_commits += 1
        if self.statistics.refused_commits == 1:
            exit_protocol.say(
                f"rank {self._ranks.rank}: a commit held an infinity or a NaN and was refused; this worker goes on "
                "from the center. If it happens again and again, the local optimizer's state (momentum) may hold it too"
            )

    def _pull(self) -> tuple[int, Flat]:
        """Makes the local parameters the center; returns its clock and the center, which may be wider than they are."""
        pulled = self._new()
        self._clock = self._server.pull(pulled)
        self.statistics.bytes += pulled.nbytes
        self._start_from(pulled)
        return self._clock, pulled

    def _start_from(self, values: Flat, *, given: bool = False) -> None:
        """Gives the local parameters these values.

        Args:
            values: from `flat.new` or `flat.pack`.
            given: nobody uses them any more.
        """
        views, before = self._views(), self._start
        flat.unpack(self._layout, values, views)
        if given and flat.is_whole(self._layout, views):
            self._start = values
        else:  # local steps start from what is rounded to the model's dtype; only what they move is committed
            self._start = self._flat()
        self._give_back(before, *([values] if given and self._start is not values else []))
