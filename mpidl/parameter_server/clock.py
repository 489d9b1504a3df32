"""Counts commits: two words, on rank 0, from which each commit's exact staleness follows.

`begun` is fetched and increased before a commit's data, `landed` increased after they were flushed; a pull reads
`landed` before its data. So a pull never misses a commit counted in its clock, and staleness never under-counts. A
third word carries the wish to stop.
"""

from __future__ import annotations

import numpy as np

from mpidl.topology import Topology
from mpidl.window import Window

_HOME = 0  # the rank that holds the words
_BEGUN, _LANDED, _STOP = 0, 1, 2


class Clock:
    """The words of one run; making it is a collective."""

    def __init__(self, ranks: Topology, name: str) -> None:
        words = np.zeros(3 if ranks.rank == _HOME else 0, np.int64)
        self._window = Window(ranks, words.size, "int64", f"the clock of {name}")
        self._window.fill(words)

    def begin(self) -> int:
        """Takes a number for a commit: 0, 1, 2, ..., each given once."""
        return self._window.fetch_add(_HOME, _BEGUN, 1)

    def land(self) -> None:
        """Counts a commit whose data have taken effect everywhere."""
        self._window.fetch_add(_HOME, _LANDED, 1)

    def advance(self, commits: int) -> None:
        """Counts commits of an earlier run as begun and landed; before any of this one."""
        self._window.fetch_add(_HOME, _BEGUN, commits)
        self._window.fetch_add(_HOME, _LANDED, commits)

    def landed(self) -> int:
        """Returns how many commits have taken effect."""
        return self._window.fetch_add(_HOME, _LANDED, 0)

    def request_stop(self) -> None:
        """Asks all workers to stop."""
        self._window.fetch_add(_HOME, _STOP, 1)

    def stop_requested(self) -> bool:
        """Returns whether some worker asked to stop."""
        return self._window.fetch_add(_HOME, _STOP, 0) > 0

    def close(self) -> None:
        """Gives the words back; a collective."""
        self._window.close()
