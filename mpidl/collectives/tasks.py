"""Collectives as tasks: generators that yield the request that must complete before the task goes on.

A request is anything with `Test() -> bool`; one that can also wait for a moment has `tried() -> bool`. What reduces
data is a `Reduction`, wherever the data are reduced: in shared memory, by lanes, by MPI, or on this rank alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, Protocol

from mpidl.errors import ClosedError

Task = Generator[Any, None, Any]


class Reduction(Protocol):
    """A request that reduces or gathers data of several ranks."""

    @property
    def differs(self) -> bool:
        """Whether another rank came with another signature, so that no data were moved; once it has completed."""

    @property
    def finite(self) -> bool:
        """Whether all that this rank gave by a gather list is finite, once the request has completed."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Time that this rank has spent on packing, and on reducing and copying, so far."""

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting; returns whether the request has completed."""

    def tried(self) -> bool:
        """As `Test`, but waits for a moment if a peer is late."""


class Completed:
    """A reduction that was complete at once, such as that of a single rank.

    Args:
        finite: whether all that was packed is finite.
        packing: seconds spent on packing.
    """

    differs = False

    def __init__(self, *, finite: bool = True, packing: float = 0.0) -> None:
        self.finite, self.seconds = finite, (packing, 0.0)

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        return True

    def tried(self) -> bool:
        return True


class Together:
    """Several requests as one, each moved on whatever the others wait for."""

    def __init__(self, requests: Iterable[Any]) -> None:
        self._left = list(requests)

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting; returns whether all have completed."""
        self._left = [request for request in self._left if not request.Test()]
        return not self._left


class RunningTask:
    """A task, moved on by `Test` like a single request.

    Attributes:
        result: what the task returned, once `Test` has been true.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._pending: Any = None
        self._done = self._broken = False
        self.result: Any = None

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting; returns whether the task has ended."""
        return self._move("Test")

    def tried(self) -> bool:
        """As `Test`, but may wait for a moment."""
        return self._move("tried")

    def _move(self, how: str) -> bool:
        if self._broken:
            raise ClosedError("this call was interrupted half-way")
        while not self._done:
            if self._pending is not None and not getattr(self._pending, how, self._pending.Test)():
                return False
            try:
                self._pending = next(self._task)
            except StopIteration as stop:
                self._done, self._pending, self.result = True, None, stop.value
            except BaseException:
                self._broken = True  # a generator that has raised would look like one that has ended
                raise
        return True


class RunningReduction(RunningTask):
    """A task that reduces data, such as MPI's allreduce and a division behind it.

    Args:
        task: the steps.
        finite: whether all that was packed before is finite.
        packing: seconds that packing took. How long a rank reduces and copies, MPI does not say.
    """

    differs = False

    def __init__(self, task: Task, *, finite: bool = True, packing: float = 0.0) -> None:
        super().__init__(task)
        self.finite, self.seconds = finite, (packing, 0.0)
