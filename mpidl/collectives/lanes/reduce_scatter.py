"""Reduce-scatter by lanes: the node reduces and scatters, leaders exchange, and each has what is its own.

All nodes have as many ranks. The data are one block for each rank. A segment is the same elements of every block, read
in such an order that what the node leaves with a rank are those of the blocks of its peers on all nodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.arrays.view import ArrayView
from mpidl.collectives.gather_list import Cut, GatherList, cut
from mpidl.collectives.lanes import pipeline as by_lanes
from mpidl.collectives.lanes.pipeline import AHEAD, Laned, Lanes, NodeJob
from mpidl.collectives.lanes.transport import Exchange, Values
from mpidl.collectives.tasks import Task

_LINE = 16  # elements


@dataclass(frozen=True)
class Strips:
    """How blocks are cut in segments.

    Attributes:
        cuts: which elements of the source a segment reads.
        starts: where the segments begin in a block, and where the last ends, in elements.
    """

    cuts: tuple[Cut, ...]
    starts: tuple[int, ...]

    def length(self, index: int) -> int:
        """Elements of a segment in one block."""
        return self.starts[index + 1] - self.starts[index]


def strips(table: Table, lanes: Lanes, blocks: Sequence[int], count: int, itemsize: int) -> Strips:
    """Returns how `table` is cut; remembered, since calls are alike.

    Args:
        table: of blocks of `count` elements.
        lanes: among whom.
        blocks: which block goes to whom: numbers of those of the first lane in the order of nodes, then of the second.
        count: elements of a block.
        itemsize: bytes of an element, as it is reduced.
    """
    most = max(by_lanes.SLICE // itemsize // len(lanes.peers) // _LINE, 1) * _LINE
    return _strips(table, tuple(blocks), count, most)


@lru_cache(maxsize=256)
def _strips(table: Table, blocks: tuple[int, ...], count: int, most: int) -> Strips:
    starts = (*range(0, count, most), count)
    return Strips(tuple(cut(table, count, blocks, start, stop) for start, stop in pairwise(starts)), starts)


@dataclass(frozen=True)
class Scattering:
    """What one reduce-scatter does; `lane_allreduce.Reduction` says what is not said here.

    Attributes:
        source: this rank's blocks.
        strips: how they are cut.
        receive: for this rank's own block; apart.
    """

    words: tuple[int, int]
    source: GatherList
    strips: Strips
    receive: ArrayView
    op: str
    divisor: float
    exchange: Exchange
    wire_dtype: str = ""


def reduce_scatter(lanes: Lanes, what: Scattering) -> ReduceScatter:
    """Starts a reduce-scatter."""
    started = ReduceScatter(lanes, what)
    lanes.start(started)
    return started


class ReduceScatter(Laned):
    """One reduce-scatter under way."""

    what = "a reduce-scatter across nodes"

    def __init__(self, lanes: Lanes, what: Scattering) -> None:
        self._scattering = what
        self._source: GatherList | None = what.source
        self._slices: list[Values] = []
        super().__init__(lanes, len(what.strips.cuts))

    def _begin(self) -> None:
        what = self._scattering
        largest = what.strips.length(0) if self._segments else 0
        nbytes = largest * len(self._lanes.peers) * what.receive.itemsize
        self._slices = [self._lanes.scratch.take(nbytes) for _ in range(AHEAD)]

    def _slice(self, index: int) -> Values:
        """What this rank exchanges of a segment: elements of its peers' blocks."""
        count, dtype = self._scattering.strips.length(index) * len(self._lanes.peers), np.dtype(self._dtype)
        return self._slices[index % AHEAD][: count * dtype.itemsize].view(dtype)

    @property
    def _dtype(self) -> str:
        return self._scattering.receive.dtype

    def _start_before(self, index: int) -> NodeJob:
        assert self._source is not None
        what, out = self._scattering, view.view(self._slice(index))
        source = what.strips.cuts[index].of(self._source)
        if self._lanes.node is None:
            return _Gathered(source, out)
        words = (what.words[0], what.words[1] + index)
        return self._lanes.node.reduce_scatter_table(words, source, out, 1.0, what.op)

    def _exchange(self, index: int) -> Task:
        what, wire = self._scattering, self._lanes.wire(index % AHEAD, self._scattering.wire_dtype)
        start, stop = what.strips.starts[index : index + 2]
        out = view.as_numpy(what.receive)[start:stop]
        yield from what.exchange.reduce_scatter(wire, self._slice(index), out, what.op, what.divisor)
        wire.end()

    def _start_after(self, index: int) -> list[NodeJob]:
        return []

    def _end(self) -> None:
        for memory in self._slices:
            self._lanes.scratch.give_back(memory)
        self._slices, self._source = [], None  # gradients are the user's alone again


class _Gathered:
    """What a node of one rank does: it packs, at once."""

    differs = False

    def __init__(self, source: GatherList, out: ArrayView) -> None:
        started = time.perf_counter()
        self.finite = source.gather(out)
        self.seconds = time.perf_counter() - started, 0.0

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        return True

    def tried(self) -> bool:
        return True
