"""Overlap: the executor's thread makes exchanges while the main thread takes local steps, one exchange at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpidl.errors import ArgumentError
from mpidl.mpi import runtime
from mpidl.mpi.executor import Executor, Future
from mpidl.parameter_server.worker.exchange import Exchange


class Overlap:
    """The exchanges of one worker that overlap with its local steps; only the main thread calls these methods.

    An exchange is under way until `wait` has returned it. What it pulled has landed then, and lies here until the
    worker takes it over.

    Args:
        name: of the algorithm, for messages.
        steps: local steps after which what was pulled is taken over; 0: no exchange overlaps with local steps.
    """

    def __init__(self, name: str, steps: int) -> None:
        self.steps = steps
        self._executor = Executor(name) if steps else None
        self._under_way: tuple[Future[None], Exchange[Any]] | None = None
        self.landed: Exchange[Any] | None = None

    def due(self, steps: int) -> bool:
        """Returns whether a worker must now take over what an exchange pulls, so many steps after it began."""
        pulls = self.landed is not None or (self._under_way is not None and self._under_way[1].pulls)
        return pulls and steps >= self.steps

    def start(self, exchange: Exchange[Any], commit: Callable[[Exchange[Any]], None] | None) -> None:
        """Has the executor's thread make an exchange; none may be under way.

        Raises:
            ClosedError: `end` was called.
        """
        assert self._executor is not None and self._under_way is None
        self._under_way = self._executor.start(lambda: exchange.run(commit)), exchange

    def wait(self, look: Callable[[], None]) -> Exchange[Any] | None:
        """Returns the exchange that was under way, once it has ended; None if there was none.

        If the wait ends by an exception of the main thread (Ctrl-C), the exchange goes on and stays under way, so that
        its commit is counted once and never made again.

        Args:
            look: called meanwhile; raises if a rank has died.
        """
        if self._under_way is None:
            return None
        future, exchange = self._under_way
        try:
            future.wait(look)
            self._under_way = None
        finally:
            if future.failed:
                self._under_way = None
        if exchange.center is not None:
            self.landed = exchange
        return exchange

    def take(self) -> Exchange[Any] | None:
        """Returns the exchange whose center has landed, to be taken over; None if there is none."""
        exchange, self.landed = self.landed, None
        return exchange

    def end(self) -> None:
        """Ends the executor's thread; harmless the second time."""
        if self._executor is not None:
            self._executor.end()


def check(overlap: int, period: str, steps: int, max_clock_spread: int | None) -> None:
    """Refuses an overlap that cannot be.

    Args:
        overlap: local steps with which an exchange overlaps; 0: none.
        period: the name of the number of steps that it may not exceed.
        steps: that number.
        max_clock_spread: see `Worker`.

    Raises:
        ArgumentError: the overlap is longer than the period, comes with a bound on clocks, or MPI allows no threads.
    """
    if not overlap:
        return
    if overlap > steps:
        raise ArgumentError(f"overlap={overlap}; expected at most {period}, which is {steps}")
    if max_clock_spread is not None:
        raise ArgumentError(
            f"overlap={overlap} and max_clock_spread={max_clock_spread}: with the first a worker never waits, with the "
            "second it waits for the slowest worker: leave one out"
        )
    level = runtime.mpi_description()["thread_level"]
    if level != "multiple":
        raise ArgumentError(
            f"overlap={overlap} needs an MPI with thread level multiple; found {level!r}: import mpidl before "
            "mpi4py.MPI, or use an MPI with threads"
        )
