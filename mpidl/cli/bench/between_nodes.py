"""What takes part in an allreduce between nodes besides `Communicator.allreduce` as it is: every algorithm by itself,
bfloat16 on the wire, and what the link gives at best.

These are calls of mpidl's own floors, where a user has no say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpidl.arrays import view
from mpidl.cli.bench import targets
from mpidl.cli.bench.ranks import Together
from mpidl.collectives import Collectives, cost_model
from mpidl.mpi.topology import wait_all

Call = Callable[[], Any]
_PIECE = 1 << 18  # bytes


class BetweenNodes:
    """Collectives of their own, one for each dtype on the wire; making them and giving them back are collectives."""

    def __init__(self, ranks: Together) -> None:
        self._ranks = ranks
        self._topologies = [ranks.comm.topology.duplicate(f"mpidl bench, {name}") for name in ("as it is", "narrow")]
        self._plain, self._narrow = (
            Collectives(topology, wire_dtype=wire)
            for topology, wire in zip(self._topologies, ("", "bfloat16"), strict=True)
        )

    @property
    def has_lanes(self) -> bool:
        """Whether anything but MPI carries out sums."""
        return self._plain.lanes is not None

    def free(self) -> None:
        """Gives the communicators back; a collective."""
        for topology in self._topologies:
            topology.free()

    def chosen(self, nbytes: int) -> str:
        """Returns the name of the contender that `Communicator.allreduce` behaves like."""
        return targets.BY.format(cost_model.choose(self._ranks.comm.topology, nbytes))

    def calls(self, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> dict[str, Call]:
        """Returns sums of x over all ranks, by name; x and out lie apart."""
        found = {targets.BY.format(name): self._sum(self._plain, name, x, out) for name in cost_model.ALGORITHMS}
        found[targets.NARROW] = self._sum(self._narrow, "direct", x, out)
        return found

    def exchange(self, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> tuple[Call, int | None]:
        """Two nodes send each other, over one rank each, what an allreduce of theirs must: all of x.

        Returns:
            The call; and whose x it brings to this rank, None if no one's.
        """
        topology = self._ranks.comm.topology
        first = topology.placement.nodes.index(0), topology.placement.nodes.index(1)
        if topology.rank not in first:
            return (lambda: None), None
        peer = first[1 - first.index(topology.rank)]

        def run() -> None:
            sequence = topology.channel.sequence
            requests = []
            for at in range(0, x.nbytes, _PIECE):  # whole, some MPIs send one way after the other
                nbytes = min(_PIECE, x.nbytes - at)
                requests.append(topology.start_receive(out.ctypes.data + at, nbytes, peer, 9))
                requests.append(topology.start_send(x.ctypes.data + at, nbytes, peer, 9))
            wait_all(topology, requests, "mpidl bench", sequence, (x, out))

        return run, peer

    @staticmethod
    def _sum(ranks: Collectives, name: str, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> Call:
        views = view.view(x), view.view(out)

        def run() -> None:
            ranks.forced = name
            sequence = ranks.topology.begin()
            request = ranks.start_sum((sequence, 0), *views, 1)
            ranks.topology.wait(request, "mpidl bench", sequence)

        return run


@contextmanager
def between_nodes(ranks: Together) -> Iterator[BetweenNodes | None]:
    """Yields None where all ranks share a node, or none share memory: there is nothing to choose."""
    made = BetweenNodes(ranks) if ranks.comm.nodes > 1 else None
    if made is not None and not made.has_lanes:
        made.free()
        made = None
    yield made
    if made is not None:
        made.free()
