"""Counts commits: two words, on one rank, from which each commit's exact staleness follows.

`begun` is fetched and increased before a commit's data, `landed` increased after they were flushed; a pull reads
`landed` before its data. So a pull never misses a commit counted in its clock, and staleness never under-counts. A
third word carries the wish to stop.
"""

from __future__ import annotations

from mpidl.topology import Topology
from mpidl.window import Plan

_BEGUN, _LANDED, _STOP = 0, 1, 2


class Clock:
    """The words of one run; making it is a collective.

    Args:
        ranks: who can reach it.
        plan: as `Clock.plan` gives it.
        home: the rank that holds the words.
    """

    def __init__(self, ranks: Topology, plan: Plan, home: int) -> None:
        self._window = plan.make(ranks)
        self._home = home

    @staticmethod
    def plan(name: str, size: int, home: int) -> Plan:
        """Returns what a clock needs of `size` ranks."""
        return Plan(f"the clock of {name}", "int64", tuple(3 if rank == home else 0 for rank in range(size)))

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

    def close(self) -> None:
        """Gives the words back; a collective."""
        self._window.close()
