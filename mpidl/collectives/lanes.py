"""Allreduce of ranks on several nodes: every rank of a node leads one slice of the data across the network.

Segment by segment: the node reduces and scatters among its leaders, each leader exchanges its slice with those of the
other nodes, the node gathers the results. While one segment is on the network, nodes work on its neighbours. How slices
are exchanged is an argument (`direct`, `halving_doubling`); what nodes do stands in csrc/node.c.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mpidl import arrays
from mpidl.arrays import ArrayView
from mpidl.collectives.in_node import Job, Node, Part
from mpidl.collectives.sources import Source
from mpidl.collectives.steps import Driven, Steps
from mpidl.collectives.wires import Scratch, Values, Wire
from mpidl.errors import MismatchError
from mpidl.topology import Topology

_SLICE = 1 << 19  # bytes of a leader's slice in one segment
_AHEAD = 3  # segments under way at a time

Exchange = Callable[[Wire, Values, str, float], Steps]


@dataclass(frozen=True)
class Reduction:
    """What one allreduce does.

    Attributes:
        words: which call it is, alike on all ranks.
        send: flat memory, or segments scattered over memory.
        receive: flat; lies apart from `send` or begins where it does.
        op: "sum" and the like.
        divisor: of each result.
        exchange: the algorithm between nodes.
        wire_dtype: in which float32 travels between nodes; "" for as it is.
    """

    words: tuple[int, int]
    send: ArrayView | Source
    receive: ArrayView
    op: str
    divisor: float
    exchange: Exchange
    wire_dtype: str = ""


class Lanes:
    """The allreduces of one topology's ranks, carried out one after the other in the order in which they are started.

    Args:
        topology: over several nodes.
        node: the ranks of this one.

    Attributes:
        number: lanes: ranks of the smallest node.
    """

    def __init__(self, topology: Topology, node: Node) -> None:
        self.topology, self.node = topology, node
        self.scratch = Scratch()
        nodes = topology.placement.nodes
        self.number = min(Counter(nodes).values())
        self.place = topology.node_ranks().index(topology.rank)
        self.peers = topology.lane_ranks()
        self._queue: deque[Allreduce] = deque()

    @property
    def leads(self) -> bool:
        """Whether this rank leads a slice; on a larger node some do not."""
        return self.place < self.number

    def allreduce(self, what: Reduction) -> Allreduce:
        """Starts an allreduce."""
        started = Allreduce(self, what)
        self._queue.append(started)
        self.move(started, patient=False)
        return started

    def move(self, target: Allreduce, *, patient: bool) -> bool:
        """Moves the oldest on, and those behind it once it has ended, until `target` has; returns whether it has."""
        try:
            while self._queue and not target.done:
                if not self._queue[0].advance(patient=patient):
                    return False
                self._queue.popleft()
        except BaseException:  # a signal: messages may be half sent, which the next call would take for its own
            self.topology.channel.give_up("an allreduce across nodes", (self, target))
            raise
        return target.done


class Allreduce:
    """One allreduce under way; a request, and the owner of the memory that it works on.

    Ordering. All ranks of a node must start the node's jobs in one order: reductions of the first segments, then in
    turn the gathering of a segment and the reduction of the one that takes its slice's memory.
    """

    def __init__(self, lanes: Lanes, what: Reduction) -> None:
        self._lanes, self._what = lanes, what
        count, number = what.receive.count, lanes.number
        segment = _SLICE // what.receive.itemsize * number
        pieces = [(start, min(segment, count - start)) for start in range(0, count, segment)]
        # A leader's slice of a segment begins at a cache line; the last leader's may be shorter.
        self._parts = [Part(start, length, (-(-length // number) + 15) // 16 * 16) for start, length in pieces]
        self._slices: list[Values] = []
        self._reduced: list[Job] = []
        self._exchanged: list[Driven] = []
        self._gathered: list[Job] = []
        self.done = False

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting."""
        return self._lanes.move(self, patient=False)

    def tried(self) -> bool:
        """Moves on, and waits for a moment if a peer on this node is late."""
        return self._lanes.move(self, patient=True)

    @property
    def finite(self) -> bool:
        """Whether all that was read from a table is finite, once the request has completed."""
        return all(job.finite for job in self._reduced)

    @property
    def seconds(self) -> tuple[float, float]:
        """Time that this rank has spent on packing, and on its node's reductions and copies, so far."""
        spent = [job.seconds for job in (*self._reduced, *self._gathered)]
        return sum(packing for packing, _ in spent), sum(reducing for _, reducing in spent)

    def advance(self, *, patient: bool) -> bool:
        """Moves this call on; returns whether it has completed. Only for the oldest."""
        if not self._slices:
            largest = self._parts[0].block if self._parts and self._lanes.leads else 0
            self._slices = [self._lanes.scratch.take(largest * self._what.receive.itemsize) for _ in range(_AHEAD)]
            for index in range(min(_AHEAD, len(self._parts))):
                self._reduce(index)
        while len(self._gathered) < len(self._parts):
            if not self._is_exchanged(len(self._gathered), patient):
                return False
            self._gather(len(self._gathered))
            if len(self._reduced) < len(self._parts):
                self._reduce(len(self._reduced))
        if self._gathered and not (self._gathered[-1].tried() if patient else self._gathered[-1].Test()):
            return False
        for job in self._gathered:
            _check(job)
        self._end()
        return True

    def _is_exchanged(self, index: int, patient: bool) -> bool:
        """Moves the exchanges on, starts those whose slice is there; returns whether number `index` has ended."""
        for exchange in self._exchanged[index:]:
            exchange.Test()
        if self._gathered:
            self._gathered[-1].Test()
        while len(self._exchanged) < len(self._reduced):
            following = self._reduced[len(self._exchanged)]
            idle = len(self._exchanged) == index  # nothing of this rank is on the network
            if not (following.tried() if patient and idle else following.Test()):
                break
            _check(following)
            self._exchanged.append(Driven(self._exchange(len(self._exchanged))))
            self._exchanged[-1].Test()
        return len(self._exchanged) > index and self._exchanged[index].Test()

    def _exchange(self, index: int) -> Steps:
        lanes, what = self._lanes, self._what
        if lanes.leads:
            wire = Wire(lanes.topology, lanes.peers, lanes.scratch, 1 + index % _AHEAD, what.wire_dtype)
            yield from what.exchange(wire, self._slice(index), what.op, what.divisor)
            wire.end()

    def _slice(self, index: int) -> Values:
        """This rank's slice of a segment, between its reduction and its gathering."""
        _, count, block = self._parts[index]
        mine = max(0, min(block, count - self._lanes.place * block))
        dtype = np.dtype(self._what.receive.dtype)
        return self._slices[index % _AHEAD][: mine * dtype.itemsize].view(dtype)

    def _reduce(self, index: int) -> None:
        what, node, mine = self._what, self._lanes.node, arrays.view(self._slice(index))
        words = (what.words[0], what.words[1] + 2 * index)
        self._reduced.append(node.reduce_scatter_part(words, what.send, self._parts[index], mine, what.op))

    def _gather(self, index: int) -> None:
        what, node, mine = self._what, self._lanes.node, arrays.view(self._slice(index))
        words = (what.words[0], what.words[1] + 2 * index + 1)
        self._gathered.append(node.allgather_part(words, mine, self._parts[index], what.receive))

    def _end(self) -> None:
        for memory in self._slices:
            self._lanes.scratch.give_back(memory)
        self._slices = []
        self._exchanged.clear()
        self._what = replace(self._what, send=self._what.receive)  # the gradients are the user's alone again
        self.done = True


def _check(job: Job) -> None:
    """What ranks call was agreed on before, so that their words cannot differ; if they do, nothing was moved."""
    if job.differs:
        raise MismatchError("ranks of a node came to different parts of an allreduce; this is a fault of mpidl's")
