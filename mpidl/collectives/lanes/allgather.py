"""Allgather by lanes: the node gathers its own blocks, leaders exchange slices of them, the node gathers the others'.

The ranks of a node follow each other, so that their blocks lie side by side in the result. What a node has is cut in
segments, each shared out among its leaders. Everything is sent from where the result lies, and received there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives.lanes import direct
from mpidl.collectives.lanes import pipeline as by_lanes
from mpidl.collectives.lanes.pipeline import AHEAD, Laned, Lanes, NodeJob, Nothing
from mpidl.collectives.lanes.transport import Values
from mpidl.collectives.node import Part
from mpidl.collectives.tasks import Task

_LINE = 64  # bytes


@dataclass(frozen=True)
class Gathering:
    """What one allgather does.

    Attributes:
        words: which call it is, alike on all ranks.
        send: this rank's block, of any dtype.
        receive: for all blocks in rank order; apart.
    """

    words: tuple[int, int]
    send: ArrayView
    receive: ArrayView


def allgather(lanes: Lanes, what: Gathering) -> Allgather:
    """Starts an allgather."""
    started = Allgather(lanes, what)
    lanes.start(started)
    return started


class Allgather(Laned):
    """One allgather under way."""

    what = "an allgather across nodes"

    def __init__(self, lanes: Lanes, what: Gathering) -> None:
        assert lanes.node is not None
        self._gathering, self._node = what, lanes.node
        self._flat = view.as_numpy(what.receive).view(np.uint8)
        placed = lanes.topology.placement.nodes
        self._own, counts = placed[lanes.topology.rank], Counter(placed)
        ends = np.cumsum([counts[node] * what.send.nbytes for node in range(len(counts))])
        self._regions = [(int(end) - counts[node] * what.send.nbytes, int(end)) for node, end in enumerate(ends)]
        self._segment = by_lanes.SLICE * lanes.number
        longest = max(end - start for start, end in self._regions)
        super().__init__(lanes, -(-longest // self._segment))

    def _part(self, node: int, index: int) -> Part:
        """A segment of what a node has, in bytes; on a smaller node the last ones are empty."""
        start, end = self._regions[node]
        start = min(start + index * self._segment, end)
        count = min(self._segment, end - start)
        return Part(start, count, -(-count // (self._lanes.number * _LINE)) * _LINE)

    def _slice(self, part: Part) -> Values:
        """What this rank leads of it."""
        start, stop = (min(place * part.block, part.count) for place in (self._lanes.place, self._lanes.place + 1))
        return self._flat[part.start + start : part.start + stop]

    def _begin(self) -> None:
        pass

    def _start_before(self, index: int) -> NodeJob:
        if index:
            return Nothing()
        start, end = self._regions[self._own]
        return self._node.allgather(self._gathering.words, self._gathering.send, view.view(self._flat[start:end]))

    def _exchange(self, index: int) -> Task:
        wire = self._lanes.wire(index % AHEAD)
        blocks = [self._slice(self._part(node, index)) for node in range(len(self._regions))]
        yield from direct.allgather_blocks(wire, blocks)
        wire.end()

    def _start_after(self, index: int) -> list[NodeJob]:
        words, receive = self._gathering.words, view.view(self._flat)
        jobs = list[NodeJob]()
        for step in range(1, len(self._regions)):
            node = (self._own + step) % len(self._regions)
            part = self._part(node, index)
            if part.count:
                told = words[0], words[1] + 1 + index * len(self._regions) + node
                jobs.append(self._node.allgather_part(told, view.view(self._slice(part)), part, receive))
        return jobs

    def _end(self) -> None:
        pass
