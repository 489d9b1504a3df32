"""How ranks find out that they made the same call, and say what differs if they did not.

The signature of a call is its number on the communicator and the fingerprint of its text. In shared memory the
signature stands beside the data. Where MPI carries out the call, the signatures travel first, as here.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpidl.collectives.tasks import Task
from mpidl.errors import MismatchError
from mpidl.mpi import cuda_aware
from mpidl.mpi.agreement import disagreement, fingerprint
from mpidl.mpi.topology import Topology

_DESCRIPTION = 480  # bytes of a call's description that travel when ranks disagree


@dataclass(frozen=True)
class Call:
    """What this rank called, or why it refuses its own arguments."""

    name: str
    arguments: str = ""
    device: str = "cpu"  # of this rank's array; may differ between ranks
    error: Exception | None = None
    agreed: bool = False  # the ranks know that all made this call
    sequence: int = 0  # the call's number on the communicator, once it has begun
    direct: bool = False  # MPI works on this rank's array where it lies, although that is on a device

    def describe(self) -> str:
        if self.error is not None:
            return f"{self.name} refused its arguments: {type(self.error).__name__}: {self.error}"
        return f"{self.name}({self.arguments})"


def describe_reduction(op: str, dtype: str, count: int) -> str:
    """Returns what reductions have in common as a call's arguments."""
    return f"op={op!r}, {dtype}, count {count}"


def agree(topology: Topology, call: Call) -> Generator[Any, None, Call]:
    """Every rank learns whether all made this call; the smallest and the largest signature travel as one minimum.

    A further word of that minimum says whether some rank, given an array on a device, wants to know whether MPI works
    on such arrays itself: then all ranks decide that together.

    Raises:
        MismatchError: they did not.
        Exception: what this rank refuses its own arguments with.
    """
    signature = np.array([call.sequence, fingerprint(call.describe())], np.int64)
    wish = cuda_aware.undecided(topology, call.device)
    mine, least = np.array([*signature, *-signature, -wish], np.int64), np.empty(5, np.int64)
    yield topology.start_words_minimum(mine, least)
    if (least[:2] != -least[2:4]).any():
        yield from raise_mismatch(topology, call)
    if call.error is not None:
        raise call.error
    if least[4]:
        yield from cuda_aware.decide(topology, call.device)
    return replace(call, agreed=True, direct=cuda_aware.direct(topology, call.device))


def raise_mismatch(topology: Topology, call: Call) -> Task:
    """Raises on every rank what the ranks called; on a rank that refused its arguments, the error of that rank."""
    sent = np.zeros(_DESCRIPTION, np.uint8)
    raw = call.describe().encode()[:_DESCRIPTION]
    sent[: len(raw)] = np.frombuffer(raw, np.uint8)
    everyone = np.empty((topology.size, _DESCRIPTION), np.uint8)
    yield topology.start_words_gather(sent, everyone)
    if call.error is not None:
        raise call.error
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone]
    raise MismatchError(f"call {call.sequence} on {topology.name} differs between ranks: {disagreement(texts)}")
