"""The way of the delta rules: commit the local steps' moves, divided or scaled, then pull."""

from __future__ import annotations

from mpidl import flat
from mpidl.flat import Flat
from mpidl.parameter_server.worker import Worker


class DeltaWorker(Worker):
    """Base of rules that any torch optimiser serves: it takes the local steps, and their sum is what is known of them.

    Args and errors as `Worker`; `communication_window` is 5 by default, as in dist-keras.
    """

    _pulled: tuple[int, Flat] | None = None  # clock and center, if the last commit has read them

    def _divisor(self, steps: int) -> int:
        """Returns what the sum of so many local steps' moves is divided by; with 1, who meets no other is exact."""
        return 1

    def _scale(self, staleness: int) -> float:
        """Returns what a commit is multiplied by, once its staleness is known: 1 if nobody committed meanwhile."""
        return 1.0

    def _commit(self) -> None:
        views, divisor = self._views(), self._divisor(self._steps)
        delta = self._memory.take(views[0])
        if flat.moves(self._layout, views, self._start, delta, divisor):
            self._send(delta, exact=divisor == 1 and flat.is_whole(self._layout, views))
        else:
            self._refuse_commit()
        self._memory.give_back(views[0], delta)

    def _send(self, delta: Flat, *, exact: bool) -> None:
        number = self._server.clock.begin()  # from here on no other commit can come to have the same number
        staleness = number - self._clock
        scale = self._scale(staleness)
        views = self._views()
        short = None
        if exact and staleness == 0:  # s + (theta - s) is not theta where a step is larger than what it moves
            short = flat.rounding(self._layout, views, self._start, delta, self._memory.take(views[0]))
        if self._spread is None:  # nobody is waited for between commit and pull
            pulled = self._memory.take(views[0])
            _, clock = self._server.commit_and_pull(delta, pulled, scale=scale, short=short, number=number)
            self._pulled = clock, pulled
        else:
            self._server.commit(delta if scale == 1.0 else delta * delta.dtype.type(scale), short, number)
        if short is not None:
            self._memory.give_back(views[0], short.values)
        self._count_commit(staleness, delta.nbytes)

    def _fetch(self) -> None:
        if self._pulled is None:
            super()._fetch()
            return
        (self._clock, pulled), self._pulled = self._pulled, None
        self.statistics.bytes += pulled.nbytes
        self._start_from(pulled, given=True)
