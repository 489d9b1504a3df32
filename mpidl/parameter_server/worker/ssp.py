"""SSP, stale synchronous parallel: fast workers wait for slow ones, but only beyond a bound.

Source: Ho et al., *More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server*, NIPS 2013.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mpidl.mpi.waiting import Backoff
from mpidl.parameter_server.center.clock import Clock


class SSP:
    """Keeps a worker at most `spread` exchanges ahead of the slowest one.

    After its commit a worker waits until the slowest has committed so often, less `spread`: it then reads a center that
    holds all commits of exchanges older than that. Before a commit it waits until the slowest has read the center so
    often, less `spread`: with 0, nobody reads a commit of the next round, and the result is that of bulk-synchronous
    rounds. A worker that has left is not waited for.

    Args:
        clock: holds everybody's counts.
        spread: None: nobody ever waits, and nothing is counted.
        look: called while this worker waits; raises if a rank has died.
    """

    def __init__(self, clock: Clock, spread: int | None, look: Callable[[], None]) -> None:
        self._clock, self._spread, self._look = clock, spread, look
        self._exchanges = 0
        self._seconds = 0.0  # waited since they were taken

    def before_commit(self) -> None:
        """Returns when this worker may commit."""
        self._wait(self._clock.fewest_pulled)

    def after_commit(self) -> None:
        """Returns when this worker may pull."""
        self._exchanges += 1
        if self._spread is not None:
            self._clock.committed()
        self._wait(self._clock.fewest_committed)

    def after_pull(self) -> None:
        """Says that this worker has read the center."""
        if self._spread is not None:
            self._clock.pulled()

    def leave(self) -> None:
        """Lets nobody wait for this worker any more."""
        if self._spread is not None:
            self._clock.leave()

    def take_seconds(self) -> float:
        """Returns the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _wait(self, slowest: Callable[[], int]) -> None:
        if self._spread is None:
            return
        backoff, started = Backoff(), time.perf_counter()
        while slowest() < self._exchanges - self._spread:
            backoff.pause()
            self._look()
        self._seconds += time.perf_counter() - started
