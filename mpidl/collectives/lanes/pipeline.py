"""Calls of ranks on several nodes: every rank of a node leads one slice of the data across the network.

Segment by segment: the node does something before (reduces and scatters among its leaders), each leader exchanges its
slice with those of the other nodes, the node does something after (gathers the results). While one segment is on the
network, nodes work on its neighbours. What is done before and after makes the collective, one file each; how slices are
exchanged is in `direct` and `halving_doubling`; what nodes do stands in csrc/node/schedule.c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from mpidl.collectives.lanes.transport import Scratch, Wire
from mpidl.collectives.node import Node
from mpidl.collectives.tasks import RunningTask, Task
from mpidl.errors import MismatchError
from mpidl.mpi.topology import Topology

SLICE = 1 << 18  # bytes of a leader's slice in one segment
AHEAD = 6  # segments under way at a time: Open MPI answers before each message, over TCP


class Lanes:
    """The calls of one topology's ranks, carried out one after the other in the order in which they are started.

    Args:
        topology: over several nodes.
        node: the ranks of this one; None where each is alone.
        peers: who leads this rank's slice on each node.
        place: which slice this rank leads; none if it is `number` or more.
        number: of slices, alike on all nodes.
        tag: the first of this object's tags on the topology.
    """

    def __init__(
        self, topology: Topology, node: Node | None, peers: Sequence[int], *, place: int, number: int, tag: int
    ) -> None:
        self.topology, self.node, self.peers = topology, node, peers
        self.place, self.number, self._tag = place, number, tag
        self.scratch = Scratch()
        self._queue: deque[Laned] = deque()

    @property
    def leads(self) -> bool:
        """Whether this rank leads a slice; on a larger node some do not."""
        return self.place < self.number

    def wire(self, tag: int, wire_dtype: str = "") -> Wire:
        """Returns what an exchange stands on; `tag` tells it from others under way."""
        return Wire(self.topology, self.peers, self.scratch, self._tag + tag, wire_dtype)

    def start(self, call: Laned) -> None:
        """Starts a call, behind those that were started before."""
        self._queue.append(call)
        self.move(call, patient=False)

    def move(self, target: Laned, *, patient: bool) -> bool:
        """Moves the oldest on, and those behind it once it has ended, until `target` has; returns whether it has."""
        try:
            while self._queue and not target.done:
                if not self._queue[0].advance(patient=patient):
                    return False
                self._queue.popleft()
        except BaseException:  # a signal: messages may be half sent, which the next call would take for its own
            self.topology.channel.give_up(target.what, (self, target))
            raise
        return target.done


def lanes_of_nodes(topology: Topology, node: Node, tag: int) -> Lanes:
    """Returns the lanes whose leaders are the first ranks of every node, as many as the smallest has."""
    number = min(Counter(topology.placement.nodes).values())
    place = topology.node_ranks().index(topology.rank)
    return Lanes(topology, node, topology.lane_ranks(), place=place, number=number, tag=tag)


class NodeJob(Protocol):
    """What a node does, a request; `in_node.Job` is one."""

    differs: bool

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting."""

    def tried(self) -> bool:
        """Moves on, and waits for a moment if a peer is late."""

    @property
    def finite(self) -> bool:
        """Whether all that was read is finite, once it has ended."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Spent on packing, and on reducing and copying."""


class Nothing:
    """What a node does where there is nothing to do."""

    differs, finite, seconds = False, True, (0.0, 0.0)

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        return True

    def tried(self) -> bool:
        return True


class Laned(ABC):
    """One call under way; a request, and the owner of the memory that it works on.

    Ordering. All ranks of a node must start the node's jobs in one order: those before the first segments, then in turn
    those after a segment and the one before the segment that takes its slice's memory.

    Args:
        lanes: whose.
        segments: how many; none is a call that has nothing to do.

    Attributes:
        what: for messages.
        done: whether it has ended.
    """

    what: str

    def __init__(self, lanes: Lanes, segments: int) -> None:
        self._lanes, self._segments = lanes, segments
        self._begun = self.done = False
        self._before: list[NodeJob] = []
        self._exchanged: list[RunningTask] = []
        self._after: list[NodeJob] = []
        self._finished = 0  # segments of which the jobs after were started

    @abstractmethod
    def _begin(self) -> None:
        """Takes what the call needs, when its turn has come."""

    @abstractmethod
    def _start_before(self, index: int) -> NodeJob:
        """Starts what the node does with a segment before its exchange."""

    @abstractmethod
    def _exchange(self, index: int) -> Task:
        """Exchanges a segment's slice; only where this rank leads one."""

    @abstractmethod
    def _start_after(self, index: int) -> list[NodeJob]:
        """Starts what the node does with a segment after its exchange, which may be nothing."""

    @abstractmethod
    def _end(self) -> None:
        """Gives back what was taken."""

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting."""
        return self._lanes.move(self, patient=False)

    def tried(self) -> bool:
        """Moves on, and waits for a moment if a peer on this node is late."""
        return self._lanes.move(self, patient=True)

    @property
    def finite(self) -> bool:
        """Whether all that was read from a table is finite, once the request has completed."""
        return all(job.finite for job in self._before)

    @property
    def seconds(self) -> tuple[float, float]:
        """Time that this rank has spent on packing, and on its node's reductions and copies, so far."""
        spent = [job.seconds for job in (*self._before, *self._after)]
        return sum(packing for packing, _ in spent), sum(reducing for _, reducing in spent)

    def advance(self, *, patient: bool) -> bool:
        """Moves this call on; returns whether it has completed. Only for the oldest."""
        if not self._begun:
            self._begin()
            self._begun = True
            for index in range(min(AHEAD, self._segments)):
                self._before.append(self._start_before(index))
        while self._finished < self._segments:
            if not self._is_exchanged(self._finished, patient):
                return False
            self._after += self._start_after(self._finished)
            self._finished += 1
            if len(self._before) < self._segments:
                self._before.append(self._start_before(len(self._before)))
        if self._after and not (self._after[-1].tried() if patient else self._after[-1].Test()):
            return False
        for job in self._after:
            self._check(job)
        self._exchanged.clear()
        self._end()
        self.done = True
        return True

    def _is_exchanged(self, index: int, patient: bool) -> bool:
        """Moves the exchanges on, starts those whose slice is there; returns whether number `index` has ended."""
        for exchange in self._exchanged[index:]:
            exchange.Test()
        if self._after:
            self._after[-1].Test()
        while len(self._exchanged) < len(self._before):
            following = self._before[len(self._exchanged)]
            idle = len(self._exchanged) == index  # nothing of this rank is on the network
            if not (following.tried() if patient and idle else following.Test()):
                break
            self._check(following)
            number = len(self._exchanged)
            self._exchanged.append(RunningTask(self._exchange(number) if self._lanes.leads else _nothing()))
            self._exchanged[-1].Test()
        return len(self._exchanged) > index and self._exchanged[index].Test()

    def _check(self, job: NodeJob) -> None:
        """What ranks call was agreed on before, so that their words cannot differ; if they do, nothing was moved."""
        if job.differs:
            raise MismatchError(f"ranks of a node came to different parts of {self.what}; this is a fault of mpidl's")


def _nothing() -> Task:
    """Task of which there are none."""
    yield from ()
