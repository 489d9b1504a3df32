"""The way of the delta rules: commit the local steps' moves, divided or scaled, then pull; at once, or beside the next
local steps, by a thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.mpi.executor import Executor, Future
from mpidl.optim import flat, validation
from mpidl.optim.flat import Few, Flat
from mpidl.parameter_server.worker import overlap as overlapping
from mpidl.parameter_server.worker.base import Worker


@dataclass(frozen=True)
class _Window:
    """What the local steps of one window came to."""

    delta: Flat
    now: list[torch.Tensor]  # where they led; nobody changes it until all is sent
    start: Flat
    clock: int  # of `start`
    base: int  # the commit's number, less its staleness
    exact: bool  # who meets no other commits all, to the last bit


@dataclass(frozen=True)
class _Sent:
    """A window that was committed, and the center that was pulled with it."""

    staleness: int
    clock: int
    pulled: Flat
    stopping: bool = False  # a worker asked to stop


@dataclass(frozen=True)
class _UnderWay:
    future: Future[_Sent]
    window: _Window
    reached: Flat  # the parameters as they were when it began


class DeltaWorker(Worker):
    """Base of rules that any torch optimiser serves: it takes the local steps, and their sum is what is known of them.

    With `overlap=k` a thread commits and pulls while the next k local steps are taken: after them the parameters move
    by what the center differed from them when the exchange began. Their gradients do not know of it: they are staler,
    by a whole round of the others, and are counted so. A worker alone is not changed by a bit where it commits the sum.

    Args:
        overlap: local steps beside which an exchange is under way, at most `communication_window`; 0: it is waited for.
            Needs an MPI with threads (THREAD_MULTIPLE).
        optimizer, model, max_clock_spread, comm, buffers: as `Worker`.
        communication_window: 5 by default, as in dist-keras.

    Raises:
        ArgumentError: `overlap` together with `max_clock_spread`; or as `Worker`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 5,
        overlap: int = 0,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._overlap = overlap
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=validation.whole("overlap", overlap, least=0),
            hyperparameters={"overlap": overlap},
        )
        self._executor = Executor(type(self).__name__) if overlap else None
        self._under_way: _UnderWay | None = None
        self._sent: _Sent | None = None  # what it came to, not taken over yet
        self._base = self._clock  # what the number of the next commit is compared with

    def _describe(self) -> dict[str, Any]:
        overlapping.check(self._overlap, "communication_window", self._window_length, self._spread)
        return super()._describe()

    def _divisor(self, steps: int) -> int:
        """Returns what the sum of so many local steps' moves is divided by; with 1, who meets no other is exact."""
        return 1

    def _scale(self, staleness: int) -> float:
        """Returns what a commit is multiplied by, once its staleness is known: 1 if nobody committed meanwhile."""
        return 1.0

    def _exchange_if_due(self) -> None:
        if self._under_way is not None and self._steps >= self._overlap:
            self._settle()
        super()._exchange_if_due()

    def _exchange(self) -> None:
        if self._executor is None:
            super()._exchange()
            return
        self._settle()
        started = time.perf_counter()
        self._server.look()
        reached = self._flat()
        window = self._window(flat.parts(self._layout, reached))
        self._steps = 0
        if window is None:
            with self._turn():
                self._pass_wish_on()
                self._refuse_commit()
                self._pull()
                self.stopping = self._server.clock.stop_requested()
        else:
            self._under_way = _UnderWay(self._executor.start(lambda: self._send_beside(window)), window, reached)
            self._base = self._clock + 1  # the center that the next steps know, and this commit of its own
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _send_beside(self, window: _Window) -> _Sent:
        """What the thread does; meanwhile nobody else uses server or memory."""
        with self._turn():
            self._pass_wish_on()
            return replace(self._send(window), stopping=self._server.clock.stop_requested())

    def _await_exchange(self) -> None:
        done = self._under_way
        if done is None or self._sent is not None:
            return
        started = time.perf_counter()
        try:
            self._sent = done.future.wait(self._server.look)
        finally:
            if done.future.failed:  # one whose wait is broken off goes on
                self._under_way = None
        self._count_commit(self._sent.staleness, done.window.delta.nbytes + self._sent.pulled.nbytes)
        self.stopping = self._sent.stopping
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _settle(self) -> None:
        self._await_exchange()
        if self._under_way is None or self._sent is None:
            return
        started, views = time.perf_counter(), self._views()
        (done, self._under_way), (sent, self._sent) = (self._under_way, None), (self._sent, None)
        if not flat.is_whole(self._layout, views):
            flat.round_like(self._layout, views, sent.pulled)
        flat.shift(self._layout, views, done.reached, sent.pulled)
        self._start, self._clock = sent.pulled, sent.clock
        self._give_back(done.window.delta, done.window.start, done.reached)
        self.statistics.seconds_communicating += time.perf_counter() - started

    def _commit(self) -> None:
        window = self._window(self._views())
        if window is None:
            self._refuse_commit()
            return
        if self._spread is None:  # nobody is waited for between commit and pull
            self._sent = self._send(window)
            staleness = self._sent.staleness
        else:
            number, staleness, scale, short = self._begin(window)
            delta = window.delta if scale == 1.0 else window.delta * window.delta.dtype.type(scale)
            self._server.commit(delta, short, number)
            self._give_back(*([] if short is None else [short.values]))
        self._count_commit(staleness, window.delta.nbytes)
        self._give_back(window.delta)

    def _fetch(self) -> None:
        if self._sent is None:
            super()._fetch()
            return
        sent, self._sent = self._sent, None
        self._clock = self._base = sent.clock
        self.statistics.bytes += sent.pulled.nbytes
        self._start_from(sent.pulled, given=True)

    def _pull(self) -> tuple[int, Flat]:
        pulled = super()._pull()
        self._base = self._clock
        return pulled

    def _window(self, now: list[torch.Tensor]) -> _Window | None:
        """Returns what is to be committed, the local steps having led to `now`; None if it is not finite."""
        delta, divisor = self._take(), self._divisor(self._steps)
        if not flat.moves(self._layout, now, self._start, delta, divisor):
            self._give_back(delta)
            return None
        exact = divisor == 1 and flat.is_whole(self._layout, self._views())
        return _Window(delta, now, self._start, self._clock, self._base, exact)

    def _begin(self, window: _Window) -> tuple[int, int, float, Few | None]:
        """Returns the commit's number, its staleness, its scale, and what rounding leaves out."""
        number = self._server.clock.begin()  # from here on no other commit can come to have the same number
        staleness = number - window.base
        scale, short = self._scale(staleness), None
        # s + (theta - s) is not theta where a step is larger than what it moves.
        if window.exact and scale == 1.0 and number == window.clock:
            short = flat.rounding(self._layout, window.now, window.start, window.delta, self._take())
        return number, staleness, scale, short

    def _send(self, window: _Window) -> _Sent:
        """Commits and pulls."""
        number, staleness, scale, short = self._begin(window)
        pulled = self._take()
        _, clock = self._server.commit_and_pull(window.delta, pulled, scale=scale, short=short, number=number)
        if short is not None:
            self._give_back(short.values)
        return _Sent(staleness, clock, pulled)

    def _end_threads(self) -> None:
        if self._executor is not None:
            self._executor.end()
        super()._end_threads()
