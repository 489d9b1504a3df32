"""What every way of committing has in common, and how a lost commit is found."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from mpidl.cli.bench.ranks import Together

SCALE = 0.5  # commits are whole numbers after it


class Way(ABC):
    """Commits whole numbers that differ by worker and by place to a center of zeros, and knows what it must be."""

    name = ""

    def __init__(self, workers: Together, count: int, first: int = 1) -> None:
        """Rank 0 is to commit `first` times the pattern, rank 1 once more, and so on; with 0 rank 0 does not work."""
        self._workers, self._first = workers, first
        self._pattern = np.resize(np.arange(1, 14, dtype=np.float32), count)
        self._moved = self._pattern * np.float32((workers.rank + first) / SCALE)
        self._commits = 0

    def run(self) -> None:
        """Commits once and pulls, or serves those who do."""
        self._commits += 1
        if self._workers.rank + self._first > 0:
            self.exchange()
        else:
            self.serve()

    @abstractmethod
    def exchange(self) -> None:
        """Commits and pulls."""

    def serve(self) -> None:  # noqa: B027  # most ways need nobody who serves
        """Does what the others need to exchange once each."""

    @abstractmethod
    def center(self) -> NDArray[np.float32]:
        """Returns a copy of the center as it now is."""

    def check(self) -> str:
        """Compares the center with the sum of all commits so far, when nobody commits; a collective of the workers."""
        self.run()
        commits = self._workers.everywhere(self._commits)  # all have landed: each worker flushed its own
        total = sum((rank + self._first) * number for rank, number in enumerate(commits))
        wrong = np.flatnonzero(self.center() != self._pattern * np.float32(total))
        self._workers.barrier()  # nobody commits before all have looked
        return f"{wrong.size} elements of the center miss a commit or hold too much" if wrong.size else ""
