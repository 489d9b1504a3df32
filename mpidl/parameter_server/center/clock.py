"""Counts commits: two counters, on one rank, from which each commit's exact staleness follows.

`begun` is fetched and increased before a commit's data, `landed` increased after they were flushed; a pull reads
`landed` before its data. So a pull never misses a commit counted in its clock, and staleness never under-counts. A
third counter carries requests to stop, a fourth the end of a warm start, two more the token of `replay`. Behind them
lie two counts of each worker's own exchanges, by which `ssp` holds fast workers back.
"""

from __future__ import annotations

import numpy as np

from mpidl.mpi.topology import Topology
from mpidl.one_sided.window import Plan

_BEGUN, _LANDED, _STOP, _WARM, _TICKET, _TOKEN = range(6)
_COUNTERS = 6
_GONE = 1 << 40  # exchanges that a worker that has left counts as having made: no worker waits for it


class Clock:
    """The counters of one run; making it is a collective.

    Args:
        ranks: those that can reach it.
        plan: as `Clock.plan` gives it.
        home: the rank that holds the counters.
        workers: how many of the ranks, the first ones, commit.
    """

    def __init__(self, ranks: Topology, plan: Plan, home: int, workers: int) -> None:
        self._window = plan.make_window(ranks)
        self._home = home
        self._rank, self._workers = ranks.rank, workers

    @staticmethod
    def plan(name: str, size: int, home: int, workers: int) -> Plan:
        """Returns what a clock needs of `size` ranks."""
        counters = _COUNTERS + 2 * workers
        return Plan(f"the clock of {name}", "int64", tuple(counters if rank == home else 0 for rank in range(size)))

    def begin(self) -> int:
        """Takes a number for a commit: 0, 1, 2, ..., each given once."""
        return self._window.fetch_add(self._home, _BEGUN, 1)

    def land(self) -> None:
        """Counts a commit whose data have taken effect everywhere."""
        self._window.fetch_add(self._home, _LANDED, 1)

    def advance(self, commits: int) -> None:
        """Counts commits of an earlier run as begun and landed; before any of this one."""
        self._window.fetch_add(self._home, _BEGUN, commits)
        self._window.fetch_add(self._home, _LANDED, commits)

    def landed(self) -> int:
        """Returns how many commits have taken effect."""
        return self._window.fetch_add(self._home, _LANDED, 0)

    def request_stop(self) -> None:
        """Asks all workers to stop."""
        self._window.fetch_add(self._home, _STOP, 1)

    def stop_requested(self) -> bool:
        """Returns whether some worker asked to stop."""
        return self._window.fetch_add(self._home, _STOP, 0) > 0

    def end_warm_start(self) -> None:
        """Ends the warm start: workers that wait for `warm` begin."""
        self._window.fetch_add(self._home, _WARM, 1)

    def warm(self) -> bool:
        """Returns whether the warm start is over."""
        return self._window.fetch_add(self._home, _WARM, 0) > 0

    def take_ticket(self) -> int:
        """Takes a place in the queue for the token: 0, 1, 2, ..., each given once."""
        return self._window.fetch_add(self._home, _TICKET, 1)

    def token(self) -> int:
        """Returns the place in the queue that has the token."""
        return self._window.fetch_add(self._home, _TOKEN, 0)

    def pass_token_on(self) -> None:
        """Passes the token on to the next place."""
        self._window.fetch_add(self._home, _TOKEN, 1)

    def committed(self) -> None:
        """Counts an exchange of this worker whose commit has landed."""
        self._count(0, 1)

    def pulled(self) -> None:
        """Counts an exchange of this worker that has also read the center."""
        self._count(1, 1)

    def leave(self) -> None:
        """Counts this worker as one that no other worker waits for any more."""
        self._count(0, _GONE)
        self._count(1, _GONE)

    def join(self) -> None:
        """Counts this worker's exchanges from 0 again, also if it has left."""
        for kind in (0, 1):
            place = _COUNTERS + kind * self._workers + self._rank
            self._window.fetch_add(self._home, place, -self._window.fetch_add(self._home, place, 0))

    def fewest_committed(self) -> int:
        """Returns the number of `committed` exchanges of the slowest worker that has not left."""
        return self._fewest(0)

    def fewest_pulled(self) -> int:
        """Returns the number of `pulled` exchanges of the slowest worker that has not left."""
        return self._fewest(1)

    def _count(self, kind: int, by: int) -> None:
        self._window.fetch_add(self._home, _COUNTERS + kind * self._workers + self._rank, by)

    def _fewest(self, kind: int) -> int:
        counts = np.empty(self._workers, np.int64)
        self._window.read(self._home, _COUNTERS + kind * self._workers, counts)
        self._window.flush(self._home)
        return int(counts.min())

    def close(self) -> None:
        """Gives the memory back; a collective."""
        self._window.close()
