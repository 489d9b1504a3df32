"""Who measures together: the ranks of a communicator, or one process that needs no MPI."""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

from mpidl.collectives.communicator import Communicator


class Ranks(Protocol):
    """What the harness needs of those who measure together."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Returns when all have come."""

    def rest(self) -> None:
        """Like `barrier`, for who has nothing to do meanwhile: sleeps, and leaves the core to the others."""

    def everywhere(self, mine: Any) -> list[Any]:
        """Returns every rank's value, any that JSON has; a collective."""

    @property
    def apart(self) -> bool:
        """Whether mpidl has found last that this rank's core shares no cache with the others' of its node."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def barrier(self) -> None:
        """Nobody else is there."""

    def rest(self) -> None:
        """Nobody else is there."""

    def everywhere(self, mine: Any) -> list[Any]:
        return [mine]

    @property
    def apart(self) -> bool:
        return False


class Together:
    """The ranks of a communicator."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.raw: Any = comm.topology.data.Dup()  # plain mpi4py, for the peers

    def free(self) -> None:
        """Gives the plain communicator back; a collective."""
        self.raw.Free()

    def barrier(self) -> None:
        self.comm.topology.barrier("mpidl bench")

    def rest(self) -> None:
        request = self.raw.Ibarrier()
        while not request.Test():
            time.sleep(0.005)

    def everywhere(self, mine: Any) -> list[Any]:
        gathered = self.comm.topology.gather_bytes(json.dumps(mine).encode(), "mpidl bench")
        return [json.loads(text) for text in gathered]

    @property
    def apart(self) -> bool:
        node = self.comm._collectives.node
        return node is not None and node.writes_past_caches
