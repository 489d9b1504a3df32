"""Calls of ranks on several nodes: every rank of a node leads one slice of the data across the network.

The data are cut in segments. With each segment the node does something before (it reduces and scatters among its
leaders), each leader exchanges its slice with the leaders of the same slice on other nodes, and the node does something
after (it gathers the results). While one segment is on the network, nodes work on its neighbours. A collective is what
its nodes do before and after: `Stages`, one file each. How slices are exchanged is in `direct` and `halving_doubling`,
what nodes do in csrc/node/schedule.c.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpidl.collectives.lanes.transport import Scratch, Transport, Values
from mpidl.collectives.node import Node, Part
from mpidl.collectives.tasks import Reduction, RunningTask, Task
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
        self._queue: deque[LaneCall] = deque()

    @property
    def leads(self) -> bool:
        """Whether this rank leads a slice; on a larger node some do not."""
        return self.place < self.number

    def part(self, start: int, count: int, line: int) -> Part:
        """Returns `count` elements from `start` on with one block for each leader; a block is a multiple of `line`."""
        return Part(start, count, -(-count // (self.number * line)) * line)

    def parts(self, count: int, segment: int, line: int) -> list[Part]:
        """Cuts `count` elements in segments of `segment` elements; see `part`."""
        return [self.part(start, min(segment, count - start), line) for start in range(0, count, segment)]

    def own_slice(self, part: Part) -> slice:
        """Returns which elements this rank leads; none where the blocks before hold them all."""
        first, last = (min(place * part.block, part.count) for place in (self.place, self.place + 1))
        return slice(part.start + first, part.start + last)

    def transport(self, tag: int, wire_dtype: str = "") -> Transport:
        """Returns what an exchange sends and receives by; `tag` tells the exchange from others under way."""
        return Transport(self.topology, self.peers, self.scratch, self._tag + tag, wire_dtype)

    def start(self, stages: Stages) -> LaneCall:
        """Starts a call, behind those that were started before."""
        call = LaneCall(self, stages)
        self._queue.append(call)
        self.move(call, patient=False)
        return call

    def move(self, target: LaneCall, *, patient: bool) -> bool:
        """Moves the oldest on, and those behind it once it has ended, until `target` has; returns whether it has."""
        try:
            while self._queue and not target.done:
                if not self._queue[0].advance(patient=patient):
                    return False
                self._queue.popleft()
        except BaseException:  # a signal: messages may be half sent, which the next call would take for its own
            self.topology.channel.give_up(target.name, (self, target))
            raise
        return target.done


def lanes_of_nodes(topology: Topology, node: Node, tag: int) -> Lanes:
    """Returns the lanes whose leaders are the first ranks of every node, as many as the smallest has."""
    number = min(Counter(topology.placement.nodes).values())
    place = topology.node_ranks().index(topology.rank)
    return Lanes(topology, node, topology.lane_ranks(), place=place, number=number, tag=tag)


class SliceMemory:
    """Memory for the slices of the segments under way; a slot is taken when it is first used.

    Args:
        scratch: where memory comes from.
        dtype: of the elements.
    """

    def __init__(self, scratch: Scratch, dtype: str) -> None:
        self._scratch, self._dtype = scratch, np.dtype(dtype)
        self._slots: dict[int, Values] = {}

    def of(self, index: int, count: int) -> Values:
        """Returns `count` elements for segment number `index`; the first segment has the largest slice."""
        slot, nbytes = index % AHEAD, count * self._dtype.itemsize
        if slot not in self._slots:
            self._slots[slot] = self._scratch.take(nbytes)
        return self._slots[slot][:nbytes].view(self._dtype)

    def free(self) -> None:
        """Gives all memory back."""
        for memory in self._slots.values():
            self._scratch.give_back(memory)
        self._slots.clear()


@dataclass(frozen=True)
class Stages:
    """What one collective does with each of its segments, which are counted from 0.

    Attributes:
        name: of the collective, for messages.
        segments: how many; none is a call that has nothing to do.
        before: starts what the node does with a segment before the exchange.
        exchange: exchanges this rank's slice of a segment; called only where this rank leads a slice.
        after: starts what the node does with a segment after the exchange, which may be nothing.
        wire_dtype: in which float32 values travel between nodes; "" for as they are.
        memory: given back when the call has ended.
    """

    name: str
    segments: int
    before: Callable[[int], Reduction]
    exchange: Callable[[Transport, int], Task]
    after: Callable[[int], Sequence[Reduction]]
    wire_dtype: str = ""
    memory: SliceMemory | None = None


class LaneCall:
    """One call under way: a `Reduction`, and the owner of the memory that the call works on.

    Ordering. All ranks of a node must start the node's jobs in one order: those before the first segments, then in turn
    those after a segment and the one before the segment that takes its slice's memory.

    Attributes:
        name: of the collective, for messages.
        done: whether the call has ended.
    """

    differs = False  # the ranks agreed on the call before it was started

    def __init__(self, lanes: Lanes, stages: Stages) -> None:
        self._lanes, self._segments = lanes, stages.segments
        self._stages: Stages | None = stages
        self.name, self.done = stages.name, False
        self._before: list[Reduction] = []
        self._exchanged: list[RunningTask] = []
        self._after: list[Reduction] = []
        self._finished = 0  # segments of which the jobs after were started

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting."""
        return self._lanes.move(self, patient=False)

    def tried(self) -> bool:
        """Moves on, and waits for a moment if a peer on this node is late."""
        return self._lanes.move(self, patient=True)

    @property
    def finite(self) -> bool:
        """Whether all that was read by a gather list is finite, once the request has completed."""
        return all(job.finite for job in self._before)

    @property
    def seconds(self) -> tuple[float, float]:
        """Time that this rank has spent on packing, and on its node's reductions and copies, so far."""
        spent = [job.seconds for job in (*self._before, *self._after)]
        return sum(packing for packing, _ in spent), sum(reducing for _, reducing in spent)

    def advance(self, *, patient: bool) -> bool:
        """Moves this call on; returns whether it has completed. Only for the oldest."""
        stages = self._stages
        assert stages is not None
        if not self._before:
            self._before += [stages.before(index) for index in range(min(AHEAD, self._segments))]
        while self._finished < self._segments:
            if not self._is_exchanged(stages, self._finished, patient):
                return False
            self._after += stages.after(self._finished)
            self._finished += 1
            if len(self._before) < self._segments:
                self._before.append(stages.before(len(self._before)))
        if self._after and not (self._after[-1].tried() if patient else self._after[-1].Test()):
            return False
        for job in self._after:
            self._check(job)
        self._end(stages)
        return True

    def _end(self, stages: Stages) -> None:
        """Lets go of all memory: what was sent, a model's gradients say, is the user's alone again."""
        self._exchanged.clear()
        if stages.memory is not None:
            stages.memory.free()
        self._stages, self.done = None, True

    def _is_exchanged(self, stages: Stages, index: int, patient: bool) -> bool:
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
            self._exchanged.append(RunningTask(self._exchange(stages, len(self._exchanged))))
            self._exchanged[-1].Test()
        return len(self._exchanged) > index and self._exchanged[index].Test()

    def _exchange(self, stages: Stages, index: int) -> Task:
        if self._lanes.leads:
            transport = self._lanes.transport(index % AHEAD, stages.wire_dtype)
            yield from stages.exchange(transport, index)
            transport.end()

    def _check(self, job: Reduction) -> None:
        """The ranks agreed on the call before, so that the signatures cannot differ; if they do, nothing was moved."""
        if job.differs:
            raise MismatchError(f"ranks of a node came to different parts of {self.name}; this is a fault of mpidl's")


def signature_of_part(signature: tuple[int, int], part: int) -> tuple[int, int]:
    """Returns the signature of one of a call's parts, alike on all ranks of a node."""
    return signature[0], signature[1] + part


def node_of(lanes: Lanes) -> Node:
    """Returns the node's ranks, which share memory; lanes of ranks that are alone carry out reduce-scatters only."""
    assert lanes.node is not None
    return lanes.node
