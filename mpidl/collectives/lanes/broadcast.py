"""Broadcast by lanes: root's node gets the data, its leaders bring slices to those of other nodes, nodes gather them.

Everything is sent from where the data lie, and received where they are wanted.
"""

from __future__ import annotations

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
class Broadcast:
    """What one broadcast does.

    Attributes:
        words: which call it is, alike on all ranks.
        memory: root's data, or where they go; of any dtype.
        root: whose data.
    """

    words: tuple[int, int]
    memory: ArrayView
    root: int


def broadcast(lanes: Lanes, what: Broadcast) -> LanedBroadcast:
    """Starts a broadcast."""
    started = LanedBroadcast(lanes, what)
    lanes.start(started)
    return started


class LanedBroadcast(Laned):
    """One broadcast under way."""

    what = "a broadcast across nodes"

    def __init__(self, lanes: Lanes, what: Broadcast) -> None:
        assert lanes.node is not None
        self._broadcast, self._node = what, lanes.node
        self._flat = view.as_numpy(what.memory).view(np.uint8)
        self._receive = view.view(self._flat)
        nodes, number = lanes.topology.placement.nodes, lanes.number
        home = [rank for rank, node in enumerate(nodes) if node == nodes[what.root]]
        self._home, self._root_place = lanes.topology.rank in home, home.index(what.root)
        self._root_node = next((place for place, rank in enumerate(lanes.peers) if rank in home), 0)
        segment, count = by_lanes.SLICE * number, self._flat.size
        pieces = [(start, min(segment, count - start)) for start in range(0, count, segment)]
        self._parts = [Part(start, n, -(-n // (number * _LINE)) * _LINE) for start, n in pieces]
        super().__init__(lanes, len(pieces))

    def _slice(self, index: int) -> Values:
        part = self._parts[index]
        start, stop = (min(place * part.block, part.count) for place in (self._lanes.place, self._lanes.place + 1))
        return self._flat[part.start + start : part.start + stop]

    def _begin(self) -> None:
        pass

    def _words(self, index: int) -> tuple[int, int]:
        return self._broadcast.words[0], self._broadcast.words[1] + index

    def _start_before(self, index: int) -> NodeJob:
        if not self._home:
            return Nothing()
        start, count, _ = self._parts[index]
        whole = view.view(self._flat[start : start + count])
        return self._node.broadcast(self._words(index), whole, self._root_place)

    def _exchange(self, index: int) -> Task:
        wire = self._lanes.wire(index % AHEAD)
        yield from direct.broadcast(wire, self._slice(index), self._root_node)
        wire.end()

    def _start_after(self, index: int) -> list[NodeJob]:
        if self._home:
            return []
        mine = view.view(self._slice(index))
        return [self._node.allgather_part(self._words(index), mine, self._parts[index], self._receive)]

    def _end(self) -> None:
        pass
