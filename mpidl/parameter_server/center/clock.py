"""Counts commits: two words, on one rank, from which each commit's exact staleness follows.

`begun` is fetched and increased before a commit's data, `landed` increased after they were flushed; a pull reads
`landed` before its data. So a pull never misses a commit counted in its clock, and staleness never under-counts. A
third word carries the wish to stop, a fourth the end of a warm start, two more a token for `replay`. Behind them lie
two counts of each worker's own exchanges, by which `ssp` holds fast workers back.
"""

from __future__ import annotations

import numpy as np

from mpidl.mpi.topology import Topology
from mpidl.one_sided.window import Plan

_BEGUN, _LANDED, _STOP, _WARM, _TICKET, _TURN = range(6)
_WORDS = 6
_GONE = 1 << 40  # exchanges that a worker counts as having made when it has left: nobody waits for it


class Clock:
    """The words of one run; making it is a collective.

    Args:
        ranks: who can reach it.
        plan: as `Clock.plan` gives it.
        home: the rank that holds the words.
        workers: how many of the ranks, the first ones, commit.
    """

    def __init__(self, ranks: Topology, plan: Plan, home: int, workers: int) -> None:
        self._window = plan.make_window(ranks)
        self._home = home
        self._rank, self._workers = ranks.rank, workers

    @staticmethod
    def plan(name: str, size: int, home: int, workers: int) -> Plan:
        """Returns what a clock needs of `size` ranks."""
        words = _WORDS + 2 * workers
        return Plan(f"the clock of {name}", "int64", tuple(words if rank == home else 0 for rank in range(size)))

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
        """Lets the workers that `warm` keeps waiting begin."""
        self._window.fetch_add(self._home, _WARM, 1)

    def warm(self) -> bool:
        """Returns whether the warm start is over."""
        return self._window.fetch_add(self._home, _WARM, 0) > 0

    def take_ticket(self) -> int:
        """Takes a place in the row of those who wait for the token: 0, 1, 2, ..., each given once."""
        return self._window.fetch_add(self._home, _TICKET, 1)

    def turn(self) -> int:
        """Returns whose turn it is, by place."""
        return self._window.fetch_add(self._home, _TURN, 0)

    def end_turn(self) -> None:
        """Passes the token on."""
        self._window.fetch_add(self._home, _TURN, 1)

    def committed(self) -> None:
        """Counts an exchange of this worker whose commit has landed."""
        self._count(0, 1)

    def pulled(self) -> None:
        """Counts an exchange of this worker that has also read the center."""
        self._count(1, 1)

    def leave(self) -> None:
        """Lets nobody wait for this worker any more."""
        self._count(0, _GONE)
        self._count(1, _GONE)

    def fewest_committed(self) -> int:
        """Returns the number of `committed` exchanges of the slowest worker that has not left."""
        return self._fewest(0)

    def fewest_pulled(self) -> int:
        """Returns the number of `pulled` exchanges of the slowest worker that has not left."""
        return self._fewest(1)

    def _count(self, kind: int, by: int) -> None:
        self._window.fetch_add(self._home, _WORDS + kind * self._workers + self._rank, by)

    def _fewest(self, kind: int) -> int:
        counts = np.empty(self._workers, np.int64)
        self._window.read(self._home, _WORDS + kind * self._workers, counts)
        self._window.flush(self._home)
        return int(counts.min())

    def close(self) -> None:
        """Gives the words back; a collective."""
        self._window.close()
