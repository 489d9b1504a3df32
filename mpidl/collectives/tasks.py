"""Collectives as generators: each yields the request that must complete before it can go on, and returns a result.

A request is anything with `Test() -> bool`; one that can also wait for a moment has `tried() -> bool`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

from mpidl.errors import ClosedError

Task = Generator[Any, None, Any]


class Together:
    """Several requests as one, each moved on whatever the others wait for."""

    def __init__(self, requests: Iterable[Any]) -> None:
        self._left = list(requests)

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting; returns whether all have completed."""
        self._left = [request for request in self._left if not request.Test()]
        return not self._left


class RunningTask:
    """A generator of requests, moved on by `Test` like a single request.

    Attributes:
        result: what the generator returned, once `Test` has been true.
    """

    def __init__(self, steps: Task) -> None:
        self._steps = steps
        self._pending: Any = None
        self._done = self._broken = False
        self.result: Any = None

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting; returns whether the generator has ended."""
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
                self._pending = next(self._steps)
            except StopIteration as stop:
                self._done, self._pending, self.result = True, None, stop.value
            except BaseException:
                self._broken = True  # a generator that has raised would look like one that has ended
                raise
        return True
