"""Reduce-scatter of gradients and allgather of weights, where each rank owns one block of what all ranks hold alike.

Ranks that share memory form a group, which holds one copy of the weights. Ranks at the same place of their groups form
a lane. In a group the node's C reduces, in rank order; what comes of it is reduced along the lanes, by MPI. Groups are
equal in size: on nodes with 4 and 2 ranks they have 2, and the first node holds two copies. Where no memory is shared
every rank is a group of its own.
"""

from __future__ import annotations

import math
import mmap
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl import arrays, shared_memory
from mpidl.arrays import ArrayView
from mpidl.collectives.agreement import number
from mpidl.collectives.chosen import Collectives, Sum
from mpidl.collectives.in_node import Job
from mpidl.collectives.sources import Source
from mpidl.collectives.steps import Driven, Steps
from mpidl.errors import SharedMemoryError
from mpidl.topology import Topology, wait_all

_GROUP, _LANE = 71, 72  # tags
_BARRIER = number("barrier of ranks that share weights")


@dataclass
class _Turn:
    """A request that completes when all earlier ones of a lane have begun: MPI wants one order on all ranks."""

    shards: Shards
    ticket: int

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        return self.shards.begun == self.ticket


class Shards:
    """The groups and lanes of one optimiser's ranks; making it is a collective, and so is freeing it.

    Attributes:
        block: the number of this rank's block.
        begun: how many reductions along the lane have begun.
    """

    def __init__(self, ranks: Collectives) -> None:
        self.ranks = ranks.topology
        self._owned: list[Topology] = []
        self._group: Collectives | None = None
        members = self._find_group(ranks)
        place, groups = members.index(self.ranks.rank), self.ranks.size // len(members)
        lane = tuple(group[place] for group in _groups(self.ranks.placement.nodes, len(members)))
        self._lane = None if groups == 1 else self._subset(lane, "lane", _LANE)
        self.block = place * groups + lane.index(self.ranks.rank)
        self._blocks = [  # of each rank
            p * groups + g
            for _, p, g in sorted(
                (rank, p, g)
                for g, group in enumerate(_groups(self.ranks.placement.nodes, len(members)))
                for p, rank in enumerate(group)
            )
        ]
        self.begun = self._tickets = 0
        self._partial: dict[int, ArrayView] = {}
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

    @property
    def several_groups(self) -> bool:
        """Whether there are several copies of the weights."""
        return self._lane is not None

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

    def start_reduce(self, words: tuple[int, int], source: Source, receive: ArrayView, divisor: int) -> Sum:
        """Starts the sum of all ranks' sources over `divisor`, of which this rank gets its own block in `receive`.

        What must not change: as for `Collectives.start_gathered_sum`.
        """
        node = None if self._group is None else self._group.node
        if self._lane is None and node is not None:
            return node.reduce_scatter_table(words, source, receive, float(divisor))
        if self._lane is None:
            return _gathered(source, receive, _divided(receive, divisor))
        ticket, self._tickets = self._tickets, self._tickets + 1
        partial = self._partial_for(receive)
        if node is None:
            return _gathered(source, partial, self._along_lane(None, ticket, partial, receive, divisor))
        job = node.reduce_scatter_table(words, source, partial, 1.0)
        return _SumAfter(self._along_lane(job, ticket, partial, receive, divisor), job)

    def _partial_for(self, receive: ArrayView) -> ArrayView:
        """What the group's sum of a lane's blocks arrives in; made once for each bucket."""
        assert self._lane is not None
        if receive.address not in self._partial:
            self._partial[receive.address] = arrays.empty_flat(receive.count * self._lane.size, receive.dtype)
        return self._partial[receive.address]

    def _along_lane(self, job: Job | None, ticket: int, partial: ArrayView, receive: ArrayView, divisor: int) -> Steps:
        assert self._lane is not None
        if job is not None:
            yield job
        yield _Turn(self, ticket)
        requests = self._lane.start_reduce_scatter(partial, receive, "sum")
        self.begun += 1
        yield from requests
        yield from _divided(receive, divisor)

    def share_weights(self, memory: mmap.mmap, places: list[tuple[int, int]]) -> None:
        """Brings what every rank has written to its own block into all groups' weights; a collective.

        Args:
            memory: the group's.
            places: of each bucket, where its weights begin, and the size of one block, in bytes.
        """
        if self._lane is not None:
            self._gather(self._lane, np.frombuffer(memory, np.uint8), places)
        self.barrier("the end of an optimizer step")

    def _gather(self, lane: Topology, flat: np.ndarray[Any, Any], places: list[tuple[int, int]]) -> None:
        """A lane's blocks lie side by side in the weights of each group."""
        requests, kept = list[Any](), list[Any]()
        sequence = lane.begin()
        for start, size in places:
            at = start + (self.block - lane.rank) * size
            send = arrays.view(flat[start + self.block * size :][:size].copy())
            receive = arrays.view(flat[at : at + size * lane.size])
            requests += lane.start_allgather(send, receive)
            kept.append((send, receive))
        wait_all(lane, requests, "sharing updated weights", sequence, kept)

    def gather_blocks(self, mine: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
        """Returns everybody's bytes of one length in the order of blocks; a collective of all ranks."""
        everyone = np.empty((self.ranks.size, mine.size), np.uint8)
        sequence = self.ranks.begin()
        send, receive = arrays.view(mine), arrays.view(everyone)
        wait_all(self.ranks, self.ranks.start_allgather(send, receive), what, sequence, (send, receive))
        ordered = np.empty_like(everyone)
        ordered[self._blocks] = everyone
        return ordered.reshape(-1)

    def free(self) -> None:
        """Gives back what was made; a collective, harmless the second time."""
        for one in self._owned:
            one.free()
        self._owned.clear()


class _SumAfter(Driven):
    """A sum whose packing is the affair of a job before it."""

    def __init__(self, steps: Steps, job: Job) -> None:
        super().__init__(steps)
        self._job = job

    @property
    def finite(self) -> bool:
        return self._job.finite

    @property
    def seconds(self) -> tuple[float, float]:
        return self._job.seconds


class _SumOfGathered(Driven):
    """A sum of what was gathered before it began."""

    def __init__(self, steps: Steps, finite: bool, packing: float) -> None:
        super().__init__(steps)
        self.finite, self.seconds = finite, (packing, 0.0)


def _gathered(source: Source, out: ArrayView, steps: Steps) -> Sum:
    started = time.perf_counter()
    finite = source.gather(out)
    return _SumOfGathered(steps, finite, time.perf_counter() - started)


def _divided(receive: ArrayView, divisor: int) -> Steps:
    if divisor != 1:
        arrays.divide(receive, divisor)
    yield from ()


def _groups(nodes: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Cuts the ranks of each node into groups of `size`, in the order of their lowest ranks."""
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    cut = [tuple(ranks[at : at + size]) for ranks in by_node.values() for at in range(0, len(ranks), size)]
    return sorted(cut)


def _group_of(topology: Topology, size: int) -> tuple[int, ...]:
    return next(group for group in _groups(topology.placement.nodes, size) if topology.rank in group)
