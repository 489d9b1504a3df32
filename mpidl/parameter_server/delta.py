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
        reached = self._flat()
        delta = self._rule(reached - self._start, self._steps)
        if not np.isfinite(delta).all():
            self._refuse_commit()
            return
        number = self._server.clock.begin()  # from here on no other commit can come to have the same number
        staleness = number - self._clock
        scale = self._scale(staleness)
        if scale != 1.0:
            delta *= scale
        same_dtype = all(state.dtype_name(p) == self._layout.dtype for _, p in self._held)
        exact = same_dtype and self._commits_the_move(self._steps)
        self._server.commit(delta, Aim(self._clock, self._start, reached) if exact else None, number)
        self._count_commit(staleness, delta.nbytes)
