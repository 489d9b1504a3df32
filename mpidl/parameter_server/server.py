"""The center variable and its two operations, commit and pull, in the *rma* protocol.

Commits are `MPI_Accumulate(SUM)`, pulls `MPI_Get_accumulate(NO_OP)`: atomic per element, so that no commit is lost,
and served by MPI while the owner computes. What a worker commits is its algorithm's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.parameter_server.clock import Clock
from mpidl.parameter_server.progress import start_progress
from mpidl.parameter_server.sharding import shard
from mpidl.service import Service
from mpidl.topology import Topology
from mpidl.waiting import Lookout
from mpidl.window import Plan


@dataclass(frozen=True)
class Aim:
    """Makes up for rounding: s + (theta - s) is not theta where a step is larger than the element that it moves."""

    clock: int  # of the pull
    pulled: np.ndarray[Any, Any]
    wanted: np.ndarray[Any, Any]


class Server:
    """A flat variable in shards, which workers commit to and pull from; making it is a collective of the workers.

    Args:
        ranks: the workers.
        initial: the whole variable, equal on all ranks, one-dimensional, float32 or float64.
        name: for messages.
        service: the dedicated servers of these workers, which then hold all shards and the clock; None: the workers
            hold them, each a shard.
    """

    def __init__(
        self, ranks: Topology, initial: np.ndarray[Any, Any], name: str, service: Service | None = None
    ) -> None:
        self._name, self._service = name, service
        owners = service.servers if service is not None else range(ranks.size)
        size = max(ranks.size, owners.stop)
        shards = shard(initial.size, len(owners), owners.start)
        counts = dict.fromkeys(range(size), 0) | {part.owner: part.count for part in shards}
        clock = Clock.plan(name, size, home=owners.start)
        center = Plan(f"the center of {name}", initial.dtype.name, tuple(counts.values()))
        self._ranks = service.open(name, (clock, center)) if service is not None else ranks  # all that hold or reach it
        self.clock = Clock(self._ranks, clock, home=owners.start)
        self._window = center.make(self._ranks)
        for part in shards[ranks.rank :: ranks.size]:  # workers share the writing out of what all of them know
            self._window.write(part.owner, 0, initial[part.start : part.start + part.count])
        self._window.flush()
        ranks.barrier(f"opening the center of {name}")  # no commit may come before its elements were written
        # Workers begin with different shards and go on to the right, so that they spread over the owners.
        first = ranks.rank % len(shards)
        self._order = shards[first:] + shards[:first]
        self._lookout = Lookout(self._ranks.channel, "")
        self._where = f"the center of {name} lies on rank(s) {', '.join(map(str, owners))}"
        held = counts[self._ranks.rank] > 0 or self._ranks.rank == owners.start
        self._progress = start_progress(self._ranks, name) if held else None

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

    def look(self) -> None:
        """Looks for ranks that have died; between exchanges nothing else would tell.

        Raises:
            RankFailedError: a rank that holds a shard, or works, is gone.
        """
        self._lookout.look(f"{self._name} cannot go on ({self._where})")

    def end_progress(self) -> None:
        """Ends the helper thread, where there is one; harmless the second time."""
        if self._progress is not None:
            self._progress.end()

    def close(self) -> None:
        """Gives the windows back; a collective of the workers."""
        self.end_progress()
        if self._service is not None:
            self._service.close(self._ranks)
        self._window.close()
        self.clock.close()
        if self._service is not None:
            self._ranks.free()
