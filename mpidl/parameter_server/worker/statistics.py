"""What asynchronous training did so far on one worker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counts and times of one worker; `optimizer.statistics`."""

    steps: int = 0  # local optimiser steps
    commits: int = 0
    refused_commits: int = 0  # held an infinity or a NaN, and were left out of the center
    staleness: Counter[int] = field(default_factory=Counter)  # commits of others that a commit misses -> how often
    bytes: int = 0  # committed and pulled
    seconds_communicating: float = 0.0  # of the main thread
    seconds_waiting: float = 0.0  # of these: for slower workers (max_clock_spread)

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Counts the seconds in it as those of communication."""
        started = time.perf_counter()
        yield
        self.seconds_communicating += time.perf_counter() - started

    @property
    def mean_staleness(self) -> float:
        """The mean of the histogram; NaN before the first commit."""
        total = sum(self.staleness.values())
        return sum(tau * n for tau, n in self.staleness.items()) / total if total else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "staleness": dict(sorted(self.staleness.items())), "mean_staleness": self.mean_staleness}
