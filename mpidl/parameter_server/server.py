"""The center variable and its two operations, commit and pull, in the *rma* protocol.

Commits are `MPI_Accumulate(SUM)`, pulls `MPI_Get_accumulate(NO_OP)`: atomic per element, so that no commit is lost,
and served by MPI while the owner computes. What a worker commits is its algorithm's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.parameter_server.clock import Clock
from mpidl.parameter_server.sharding import shard
from mpidl.topology import Topology
from mpidl.window import Window


@dataclass(frozen=True)
class Aim:
    """Makes up for rounding: s + (theta - s) is not theta where a step is larger than the element that it moves."""

    clock: int  # of the pull
    pulled: np.ndarray[Any, Any]
    wanted: np.ndarray[Any, Any]


class Server:
    """A flat variable over all ranks; making it is a collective.

    Args:
        ranks: who holds shards and works.
        initial: the whole variable, equal on all ranks, one-dimensional, float32 or float64.
        name: for messages.
    """

    def __init__(self, ranks: Topology, initial: np.ndarray[Any, Any], name: str) -> None:
        self._shards = shard(initial.size, ranks.size)
        own = self._shards[ranks.rank]
        self.clock = Clock(ranks, name)
        self._window = Window(ranks, own.count, initial.dtype.name, f"the center of {name}")
        self._window.fill(initial[own.start : own.start + own.count])
        # Each rank begins with its own shard and goes on to the right, so that workers spread over the owners.
        self._order = self._shards[ranks.rank :] + self._shards[: ranks.rank]

    def commit(self, delta: np.ndarray[Any, Any], aim: Aim | None = None) -> int:
        """Adds `delta` to the center and returns the commit's number: how many commits began before it.

        Args:
            delta: flat, of the center's dtype.
            aim: where the center should be afterwards, exactly, if nobody else committed since the pull.
        """
        number = self.clock.begin()
        for part in self._order:
            if part.count:
                self._window.add(part.owner, 0, delta[part.start : part.start + part.count])
        if aim is not None and number == aim.clock:
            self._correct(aim.wanted - (aim.pulled + delta))
        self._window.flush()
        self.clock.land()  # only now: who reads this count must find the data
        return number

    def pull(self, out: np.ndarray[Any, Any]) -> int:
        """Copies the center into `out` and returns a clock: every commit that it counts is in the copy."""
        landed = self.clock.landed()  # before the data: later commits may be in the copy, counted ones must be
        for part in self._order:
            if part.count:
                self._window.read(part.owner, 0, out[part.start : part.start + part.count])
        self._window.flush()
        return landed

    def restore(self, clock: int, residual: np.ndarray[Any, Any] | None) -> None:
        """Makes a variable that was just made go on from a saved one; by one rank, before any commit or pull.

        Args:
            clock: commits in the saved variable.
            residual: saved minus initial, where the initial one was rounded; the sum is exact.
        """
        if residual is not None:
            self._correct(residual)
            self._window.flush()
        self.clock.advance(clock)

    def _correct(self, residual: np.ndarray[Any, Any]) -> None:
        """Adds the few elements that are not zero; MPI keeps them behind the commit's own, element by element."""
        for part in self._order:
            values = residual[part.start : part.start + part.count]
            indices = np.flatnonzero(values).astype(np.int32)
            if indices.size:
                self._window.add_at(part.owner, indices, values[indices])

    def close(self) -> None:
        """Gives the windows back; a collective."""
        self._window.close()
        self.clock.close()
