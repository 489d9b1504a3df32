"""The way of the delta rules: commit something made of the local steps' moves, then pull."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from mpidl import state
from mpidl.flat import Flat
from mpidl.parameter_server.server import Aim
from mpidl.parameter_server.worker import Worker


class DeltaWorker(Worker):
    """Base of rules that any torch optimiser serves: it takes the local steps, and their sum is what is known of them.

    Args and errors as `Worker`; `communication_window` is 5 by default, as in dist-keras.
    """

    _pulled: tuple[int, Flat] | None = None  # clock and center, if the last commit has read them

    @abstractmethod
    def _rule(self, moved: Flat, steps: int) -> Flat:
        """Returns what is committed after `steps` local steps that `moved` the parameters; may change it in place."""

    def _commits_the_move(self, steps: int) -> bool:
        """Returns whether `_rule` gives back `moved` unchanged; then a commit that met no other is exact."""
        return False

    def _scale(self, staleness: int) -> float:
        """Returns what a commit is multiplied by, once its staleness is known: 1 if nobody committed meanwhile."""
        return 1.0

    def _commit(self) -> None:
        reached, moved = self._flat(), self._memory.take(self._views()[0])
        delta = self._rule(np.subtract(reached, self._start, out=moved), self._steps)
        if _is_finite(delta):
            self._send(delta, reached)
        else:
            self._refuse_commit()
        self._memory.give_back(self._views()[0], reached, moved)

    def _send(self, delta: Flat, reached: Flat) -> None:
        number = self._server.clock.begin()  # from here on no other commit can come to have the same number
        staleness = number - self._clock
        scale = self._scale(staleness)
        same_dtype = all(state.dtype_name(p) == self._layout.dtype for _, p in self._held)
        exact = same_dtype and self._commits_the_move(self._steps)
        aim = Aim(self._clock, self._start, reached) if exact else None
        if self._spread is None:  # nobody is waited for between commit and pull
            pulled = self._memory.take(self._views()[0])
            self._pulled = self._server.commit_and_pull(delta, pulled, scale=scale, aim=aim, number=number)[1], pulled
        else:
            self._server.commit(delta if scale == 1.0 else delta * delta.dtype.type(scale), aim, number)
        self._count_commit(staleness, delta.nbytes)

    def _fetch(self) -> None:
        if self._pulled is None:
            super()._fetch()
            return
        (self._clock, pulled), self._pulled = self._pulled, None
        self.statistics.bytes += pulled.nbytes
        self._start_from(pulled)
        self._memory.give_back(self._views()[0], pulled)


def _is_finite(values: Flat) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        # A finite sum has finite terms; otherwise it may only be too large.
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
