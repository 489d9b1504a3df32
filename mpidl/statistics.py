"""What synchronous training counts: `optimizer.statistics`; asynchronous classes have a `Statistics` of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Statistics:
    """What synchronous training did so far on this rank."""

    steps: int = 0  # optimiser steps
    rounds: int = 0  # reductions of all gradients
    bytes: int = 0  # gradient bytes that this rank gave to reductions, in the dtype in which they are summed
    seconds_communicating: float = 0.0  # time spent in hooks and at the end of backward
    nonfinite_rounds: int = 0  # rounds in which some rank's gradient held an infinity or a NaN

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))
