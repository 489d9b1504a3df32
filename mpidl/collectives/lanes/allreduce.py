"""Allreduce by lanes: the node reduces and scatters, leaders exchange their slices, the node gathers the results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives.gather_list import GatherList
from mpidl.collectives.lanes import pipeline as by_lanes
from mpidl.collectives.lanes.pipeline import AHEAD, Laned, Lanes, NodeJob
from mpidl.collectives.lanes.transport import Exchange, Values
from mpidl.collectives.node import Part
from mpidl.collectives.tasks import Task


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
    send: ArrayView | GatherList
    receive: ArrayView
    op: str
    divisor: float
    exchange: Exchange
    wire_dtype: str = ""


def allreduce(lanes: Lanes, what: Reduction) -> Allreduce:
    """Starts an allreduce."""
    started = Allreduce(lanes, what)
    lanes.start(started)
    return started


class Allreduce(Laned):
    """One allreduce under way."""

    what = "an allreduce across nodes"

    def __init__(self, lanes: Lanes, what: Reduction) -> None:
        assert lanes.node is not None
        self._reduction, self._node = what, lanes.node
        count, number = what.receive.count, lanes.number
        segment = by_lanes.SLICE // what.receive.itemsize * number
        pieces = [(start, min(segment, count - start)) for start in range(0, count, segment)]
        # A leader's slice of a segment begins at a cache line; the last leader's may be shorter.
        self._parts = [Part(start, length, (-(-length // number) + 15) // 16 * 16) for start, length in pieces]
        self._slices: list[Values] = []
        super().__init__(lanes, len(pieces))

    def _begin(self) -> None:
        largest = self._parts[0].block if self._parts and self._lanes.leads else 0
        nbytes = largest * self._reduction.receive.itemsize
        self._slices = [self._lanes.scratch.take(nbytes) for _ in range(AHEAD)]

    def _slice(self, index: int) -> Values:
        """This rank's slice of a segment, between its reduction and its gathering."""
        _, count, block = self._parts[index]
        mine = max(0, min(block, count - self._lanes.place * block))
        dtype = np.dtype(self._reduction.receive.dtype)
        return self._slices[index % AHEAD][: mine * dtype.itemsize].view(dtype)

    def _start_before(self, index: int) -> NodeJob:
        what, mine = self._reduction, view.view(self._slice(index))
        words = (what.words[0], what.words[1] + 2 * index)
        return self._node.reduce_scatter_part(words, what.send, self._parts[index], mine, what.op)

    def _exchange(self, index: int) -> Task:
        what, wire = self._reduction, self._lanes.wire(index % AHEAD, self._reduction.wire_dtype)
        yield from what.exchange.allreduce(wire, self._slice(index), what.op, what.divisor)
        wire.end()

    def _start_after(self, index: int) -> list[NodeJob]:
        what, mine = self._reduction, view.view(self._slice(index))
        words = (what.words[0], what.words[1] + 2 * index + 1)
        return [self._node.allgather_part(words, mine, self._parts[index], what.receive)]

    def _end(self) -> None:
        for memory in self._slices:
            self._lanes.scratch.give_back(memory)
        self._slices = []
        self._reduction = replace(self._reduction, send=self._reduction.receive)  # gradients are the user's alone again
