"""Where the ranks of a communicator run, and what lies between their nodes: frozen values.

How it is found out is in `topology` and `collectives.costs`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mpidl.errors import ArgumentError
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


def pretended_node_size() -> int:
    """MPIDL_NODE_SIZE=k pretends that nodes have k ranks each; 0: it is not set.

    Raises:
        ArgumentError: it makes no sense.
    """
    text = os.environ.get("MPIDL_NODE_SIZE", "")
    if not text:
        return 0
    if not text.isdigit() or int(text) < 1:
        raise ArgumentError(f"MPIDL_NODE_SIZE={text!r}: expected a positive number of ranks per node")
    return int(text)


def helper_wish() -> bool | None:
    """What MPIDL_HELPER says: whether a thread moves gradients on beside backward; None: what suits the cores.

    Raises:
        ArgumentError: it makes no sense.
    """
    text = os.environ.get("MPIDL_HELPER", "")
    if text not in ("", "0", "1"):
        raise ArgumentError(f"MPIDL_HELPER={text!r}: expected 0 (no helper thread) or 1")
    return None if not text else text == "1"
