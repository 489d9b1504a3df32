"""Where the ranks of a communicator run, and what lies between their nodes: frozen values.

How it is found out is in `topology` and `collectives.cost_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpidl.mpi.processes import Process


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a communicator run; one entry per rank."""

    nodes: tuple[int, ...]  # index of its node, counted from 0 in the order of each node's lowest rank
    processes: tuple[Process, ...]
    cores: tuple[frozenset[int], ...]  # affinity mask


@dataclass(frozen=True)
class Link:
    """What a message between two nodes costs."""

    latency: float  # seconds, one way
    per_byte: float  # seconds
    measured: bool = True  # or supposed, so that choices depend on sizes alone

    def as_dict(self) -> dict[str, Any]:
        return {"latency": self.latency, "per_byte": self.per_byte, "measured": self.measured}
