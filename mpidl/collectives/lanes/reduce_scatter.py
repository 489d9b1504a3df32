"""Reduce-scatter by lanes: the node reduces and scatters, leaders exchange, and each has what is its own.

All nodes have as many ranks. The data are one block for each rank. A segment is the same elements of every block, read
in such an order that what the node leaves with a rank are those of the blocks of its peers on all nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.arrays.view import ArrayView
from mpidl.collectives.gather_list import Cut, GatherList, cut, packed
from mpidl.collectives.lanes import pipeline
from mpidl.collectives.lanes.pipeline import LaneCall, Lanes, SliceMemory, Stages, signature_of_part
from mpidl.collectives.lanes.transport import Exchange, Transport, Values
from mpidl.collectives.tasks import Reduction, Task

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


def cut_in_strips(table: Table, lanes: Lanes, blocks: Sequence[int], count: int, itemsize: int) -> Strips:
    """Returns how `table` is cut; remembered, since calls are alike.

    Args:
        table: of blocks of `count` elements.
        lanes: among whom.
        blocks: which block goes to whom: numbers of those of the first lane in the order of nodes, then of the second.
        count: elements of a block.
        itemsize: bytes of an element, as it is reduced.
    """
    most = max(pipeline.SLICE // itemsize // len(lanes.peers) // _LINE, 1) * _LINE
    return _strips(table, tuple(blocks), count, most)


@lru_cache(maxsize=256)
def _strips(table: Table, blocks: tuple[int, ...], count: int, most: int) -> Strips:
    starts = (*range(0, count, most), count)
    return Strips(tuple(cut(table, count, blocks, start, stop) for start, stop in pairwise(starts)), starts)


def reduce_scatter(
    lanes: Lanes,
    signature: tuple[int, int],
    send: GatherList,
    receive: ArrayView,
    *,
    blocks: Sequence[int],
    op: str,
    divisor: float,
    exchange: Exchange,
    wire_dtype: str = "",
) -> LaneCall:
    """Starts a reduce-scatter.

    Args:
        lanes: whose leaders exchange.
        signature: of the call, alike on all ranks.
        send: this rank's blocks, each as long as `receive`.
        receive: for this rank's own block; apart.
        blocks: which block goes to whom: numbers of those of the first lane in the order of nodes, then of the second.
        op: "sum" and the like.
        divisor: of each result.
        exchange: the algorithm between nodes.
        wire_dtype: in which float32 values travel between nodes; "" for as they are.
    """
    strips = cut_in_strips(send.table, lanes, blocks, receive.count, receive.itemsize)
    memory, out = SliceMemory(lanes.scratch, receive.dtype), view.as_numpy(receive)

    def own_slice(index: int) -> Values:
        """What this rank exchanges of a segment: elements of its peers' blocks."""
        return memory.of(index, strips.length(index) * len(lanes.peers))

    def before(index: int) -> Reduction:
        part, mine = strips.cuts[index].of(send), view.view(own_slice(index))
        if lanes.node is None:
            return packed(part, mine)
        return lanes.node.reduce_scatter_list(signature_of_part(signature, index), part, mine, 1.0, op)

    def exchange_slice(transport: Transport, index: int) -> Task:
        start, stop = strips.starts[index : index + 2]
        yield from exchange.reduce_scatter(transport, own_slice(index), out[start:stop], op, divisor)

    def after(index: int) -> list[Reduction]:
        return []

    stages = Stages(
        "a reduce-scatter across nodes", len(strips.cuts), before, exchange_slice, after, wire_dtype, memory
    )
    return lanes.start(stages)
