"""The counters of synchronous training, `optimizer.statistics`; `parameter_server` has its own `Statistics`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counters of synchronous training on this rank."""

    steps: int = 0  # optimiser steps
    rounds: int = 0  # reductions of all gradients
    bytes: int = 0  # gradient bytes that this rank gave to reductions, in the dtype in which they are summed
    seconds_communicating: float = 0.0  # time spent in hooks and at the end of backward
    seconds_packing: list[float] = field(default_factory=list)  # by bucket: gathering gradients to be sent
    seconds_reducing: list[float] = field(default_factory=list)  # by bucket: sums, and copies of what others summed
    seconds_waiting: list[float] = field(
        default_factory=list
    )  # by bucket: waiting at the end of backward; where MPI reduces, all of its work
    nonfinite_rounds: int = 0  # rounds in which some rank's gradient held an infinity or a NaN

    def note_bucket(self, number: int, seconds: tuple[float, float, float]) -> None:
        """Adds the seconds that one reduction of a bucket took: packing, reducing, waiting."""
        for kept, more in zip(
            (self.seconds_packing, self.seconds_reducing, self.seconds_waiting), seconds, strict=True
        ):
            kept.extend([0.0] * (number + 1 - len(kept)))
            kept[number] += more

    def forget_buckets(self) -> None:
        """Clears the counters by bucket, since the buckets have been cut anew."""
        for kept in (self.seconds_packing, self.seconds_reducing, self.seconds_waiting):
            kept.clear()

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))
