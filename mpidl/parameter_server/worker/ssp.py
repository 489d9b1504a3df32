"""SSP, stale synchronous parallel: fast workers wait for slow ones, but only beyond a bound, the clock spread.

Source: Ho et al., *More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server*, NIPS 2013.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpidl.mpi.waiting import Backoff
from mpidl.parameter_server.center.clock import Clock


class SSP:
    """Keeps a worker at most `spread` exchanges ahead of the slowest worker.

    After its commit a worker waits until the slowest worker has committed as often, less `spread`: the center that it
    reads then holds all commits of exchanges older than that. Before a commit a worker waits until the slowest worker
    has pulled as often, less `spread`: with a spread of 0 no worker reads a commit of the next round, and the result is
    that of bulk-synchronous rounds. Workers do not wait for a worker that has left.

    Args:
        clock: holds the counts of all workers.
        spread: exchanges; None: no worker ever waits, and nothing is counted.
        look: called while this worker waits; raises if a rank has died.
    """

    def __init__(self, clock: Clock, spread: int | None, look: Callable[[], None]) -> None:
        self._clock, self._spread, self._look = clock, spread, look
        self._exchanges = 0
        self._seconds = 0.0  # waited since they were taken

    @property
    def bounded(self) -> bool:
        """Whether a worker may have to wait for slower ones."""
        return self._spread is not None

    @contextmanager
    def exchange(self, bounded: bool = True) -> Iterator[Callable[[], None]]:
        """Holds the bound around one exchange; the value is called between its commit and its pull.

        Args:
            bounded: False: this exchange neither waits nor counts.
        """
        if not (bounded and self.bounded):
            yield _nothing
            return
        self._wait(self._clock.fewest_pulled)
        yield self._after_commit
        self._clock.pulled()

    def _after_commit(self) -> None:
        """Counts the commit; returns when this worker may pull."""
        self._exchanges += 1
        self._clock.committed()
        self._wait(self._clock.fewest_committed)

    def leave(self) -> None:
        """Lets no worker wait for this one any more."""
        if self.bounded:
            self._clock.leave()

    def join(self) -> None:
        """Counts from 0 again, after `leave`; all workers do, and a barrier must follow before the next exchange."""
        if self.bounded:
            self._exchanges = 0
            self._clock.join()

    def take_seconds(self) -> float:
        """Returns the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _wait(self, slowest: Callable[[], int]) -> None:
        assert self._spread is not None
        backoff, started = Backoff(), time.perf_counter()
        while slowest() < self._exchanges - self._spread:
            backoff.pause()
            self._look()
        self._seconds += time.perf_counter() - started


def _nothing() -> None:
    """Nothing is waited for."""
