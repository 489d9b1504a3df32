"""Reduce-scatter of gradients and allgather of weights, where each rank owns one block of what all ranks hold alike.

Ranks that share memory form a group, which holds one copy of the weights. Ranks at the same place of their groups form
a lane, along which blocks travel (`reduce_scatter`, and the exchanges between nodes by themselves). Groups are
equal in size: on nodes with 4 and 2 ranks they have 2, and the first node holds two copies. Where no memory is shared
every rank is a group of its own. Where groups are nodes, sums are taken in the order of an allreduce by the same
exchange, and are the same bits.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from typing import Any

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives import cost_model
from mpidl.collectives.dispatch import Collectives
from mpidl.collectives.gather_list import GatherList, packed
from mpidl.collectives.lanes.pipeline import AHEAD, Lanes
from mpidl.collectives.lanes.reduce_scatter import reduce_scatter
from mpidl.collectives.lanes.start import EXCHANGES
from mpidl.collectives.lanes.transport import Exchange, Transport
from mpidl.collectives.tasks import Reduction, RunningTask, Task, Together
from mpidl.errors import SharedMemoryError
from mpidl.mpi import shared_memory
from mpidl.mpi.agreement import fingerprint
from mpidl.mpi.topology import Topology, wait_all

_GROUP, _TAG = 71, 101  # tags: of making a group; the first of messages
_BARRIER = fingerprint("barrier of ranks that share weights")


class Shards:
    """The groups and lanes of one optimiser's ranks; making it is a collective, and so is freeing it.

    Attributes:
        block: the number of this rank's block.
    """

    def __init__(self, ranks: Collectives) -> None:
        self.ranks, self._wire_dtype = ranks.topology, ranks.wire_dtype
        self._owned: list[Topology] = []
        self._group: Collectives | None = None
        members = self._find_group(ranks)
        groups = _groups(self.ranks.placement.nodes, len(members))
        place = members.index(self.ranks.rank)
        lane = tuple(group[place] for group in groups)
        self.block = place * len(groups) + lane.index(self.ranks.rank)
        of_rank = sorted((rank, p * len(groups) + g) for g, group in enumerate(groups) for p, rank in enumerate(group))
        self._blocks = [block for _, block in of_rank]
        node = None if self._group is None else self._group.node
        self._lanes = (
            None if len(groups) == 1 else Lanes(self.ranks, node, lane, place=place, number=len(members), tag=_TAG)
        )
        self._spread = cost_model.Spread(len(groups), len(members), self.ranks.size)
        self._size = len(members)

    def _find_group(self, ranks: Collectives) -> tuple[int, ...]:
        topology = ranks.topology
        size = math.gcd(*Counter(topology.placement.nodes).values())
        members = _group_of(topology, size)
        if size == topology.size:
            self._group = ranks if ranks.node is not None else None
        elif size > 1:
            self._group = Collectives(self._subset(members, "group", _GROUP))
        shared = self._group is not None and self._group.node is not None
        if topology.gather_words(np.array([shared], np.int64), "sharing weights").all():
            return members
        for one in self._owned:
            one.free()
        self._owned.clear()
        self._group = None
        return (topology.rank,)

    def _subset(self, members: tuple[int, ...], what: str, tag: int) -> Topology:
        made = self.ranks.subset(members, f"{what} of {self.ranks.name}", tag)
        self._owned.append(made)
        return made

    @property
    def group_size(self) -> int:
        """How many ranks share one copy of the weights."""
        return self._size

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its group that writes for all."""
        return self._group is None or self._group.topology.rank == 0

    def memory(self, nbytes: int) -> mmap.mmap:
        """Maps the group's memory for the weights; a collective of all ranks.

        Raises:
            SharedMemoryError: a node has too little; alike on all ranks.
        """
        memory, problem = None, ""
        if self._group is None:
            memory = mmap.mmap(-1, nbytes)
        else:
            try:
                memory = shared_memory.map_memory(self._group.topology, nbytes)
            except SharedMemoryError as error:
                problem = str(error)
        problems = self.ranks.gather_bytes(problem.encode(), "making memory for the weights")
        found = next(filter(None, problems), b"").decode()
        if found or memory is None:
            raise SharedMemoryError(found or "ranks of one node do not see the same /dev/shm")
        return memory

    def barrier(self, what: str) -> None:
        """Returns when all ranks of the group have come."""
        if self._group is not None and self._group.node is not None:
            topology = self._group.topology
            sequence = topology.begin()
            topology.wait(self._group.node.agree((sequence, _BARRIER)), what, sequence)

    def start_reduce(
        self, signature: tuple[int, int], gather_list: GatherList, receive: ArrayView, divisor: int
    ) -> Reduction:
        """Starts the sum of what all ranks gather over `divisor`; this rank gets its own block in `receive`.

        What must not change: as for `Collectives.start_gathered_sum`.
        """
        lanes, node = self._lanes, None if self._group is None else self._group.node
        if lanes is None and node is not None:
            return node.reduce_scatter_list(signature, gather_list, receive, float(divisor))
        if lanes is None:
            alone = packed(gather_list, receive)
            if divisor != 1:
                view.divide(receive, divisor)
            return alone
        exchange = self._exchange(receive.nbytes * self.ranks.size, receive.dtype)
        options: dict[str, Any] = {"op": "sum", "divisor": float(divisor), "exchange": exchange}
        options |= {"blocks": range(self.ranks.size), "wire_dtype": self._wire_dtype}
        return reduce_scatter(lanes, signature, gather_list, receive, **options)

    def _exchange(self, nbytes: int, dtype: str) -> Exchange:
        narrow = bool(self._wire_dtype) and dtype == "float32"
        return EXCHANGES[cost_model.choose_exchange(self.ranks, self._spread, nbytes, narrow=narrow)]

    def share_weights(self, memory: mmap.mmap, places: list[tuple[int, int]]) -> None:
        """Brings what every rank has written to its own block into all groups' weights; a collective.

        Args:
            memory: the group's.
            places: of each bucket, where its weights begin, and the size of one block, in bytes.
        """
        if self._lanes is not None:
            self._gather(self._lanes, np.frombuffer(memory, np.uint8), places)
        self.barrier("the end of an optimizer step")

    def _gather(self, lanes: Lanes, flat: np.ndarray[Any, Any], places: list[tuple[int, int]]) -> None:
        """A lane's blocks lie side by side in the weights of each group."""
        sequence = self.ranks.begin()
        gathers = list[RunningTask]()
        for bucket, (start, size) in enumerate(places):
            exchange, transport = self._exchange(size * self.ranks.size, "uint8"), lanes.transport(AHEAD + bucket)
            blocks = flat[start + lanes.place * len(lanes.peers) * size :][: len(lanes.peers) * size]
            gathers.append(RunningTask(_gathered(exchange, transport, blocks)))
        wait_all(self.ranks, [Together(gathers)], "sharing updated weights", sequence, (flat, gathers))

    def gather_blocks(self, mine: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
        """Returns everybody's bytes of one length in the order of blocks; a collective of all ranks."""
        everyone = np.empty((self.ranks.size, mine.size), np.uint8)
        sequence = self.ranks.begin()
        send, receive = view.view(mine), view.view(everyone)
        wait_all(self.ranks, self.ranks.start_allgather(send, receive), what, sequence, (send, receive))
        ordered = np.empty_like(everyone)
        ordered[self._blocks] = everyone
        return ordered.reshape(-1)

    def free(self) -> None:
        """Gives back what was made; a collective, harmless the second time."""
        for one in self._owned:
            one.free()
        self._owned.clear()


def _gathered(exchange: Exchange, transport: Transport, blocks: np.ndarray[Any, Any]) -> Task:
    yield from exchange.allgather(transport, blocks)
    transport.end()


def _groups(nodes: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Cuts the ranks of each node into groups of `size`, in the order of their lowest ranks."""
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    cut = [tuple(ranks[at : at + size]) for ranks in by_node.values() for at in range(0, len(ranks), size)]
    return sorted(cut)


def _group_of(topology: Topology, size: int) -> tuple[int, ...]:
    return next(group for group in _groups(topology.placement.nodes, size) if topology.rank in group)
