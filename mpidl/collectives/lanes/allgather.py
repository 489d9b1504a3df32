"""Allgather by lanes: the node gathers its own blocks, leaders exchange slices of them, the node gathers the others'.

The ranks of a node follow each other, so that their blocks lie side by side in the result: the region of the node. A
region is cut in segments, each shared out among the node's leaders. All is sent from where the result lies, and
received there.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives.lanes import direct, pipeline
from mpidl.collectives.lanes.pipeline import LaneCall, Lanes, Stages, node_of, signature_of_part
from mpidl.collectives.lanes.transport import Transport
from mpidl.collectives.node import Part
from mpidl.collectives.tasks import Completed, Reduction, Task

_LINE = 64  # bytes


def allgather(lanes: Lanes, signature: tuple[int, int], send: ArrayView, receive: ArrayView) -> LaneCall:
    """Starts an allgather.

    Args:
        lanes: whose leaders exchange.
        signature: of the call, alike on all ranks.
        send: this rank's block, of any dtype.
        receive: for all blocks in rank order; apart.
    """
    node, flat = node_of(lanes), view.as_numpy(receive).view(np.uint8)
    regions, own = _regions(lanes, send.nbytes), lanes.topology.placement.nodes[lanes.topology.rank]
    segment = pipeline.SLICE * lanes.number

    def part(of: int, index: int) -> Part:
        """A segment of a node's region, in bytes; the last segments of a smaller node are empty."""
        start = min(regions[of].start + index * segment, regions[of].stop)
        return lanes.part(start, min(segment, regions[of].stop - start), _LINE)

    def before(index: int) -> Reduction:
        return Completed() if index else node.allgather(signature, send, view.view(flat[regions[own]]))

    def exchange(transport: Transport, index: int) -> Task:
        blocks = [flat[lanes.own_slice(part(of, index))] for of in range(len(regions))]
        yield from direct.allgather_blocks(transport, blocks)

    def after(index: int) -> list[Reduction]:
        jobs = list[Reduction]()
        for step in range(1, len(regions)):
            of = (own + step) % len(regions)
            theirs = part(of, index)
            if theirs.count:
                told = signature_of_part(signature, 1 + index * len(regions) + of)
                mine = view.view(flat[lanes.own_slice(theirs)])
                jobs.append(node.allgather_part(told, mine, theirs, view.view(flat)))
        return jobs

    segments = -(-max(region.stop - region.start for region in regions) // segment)
    return lanes.start(Stages("an allgather across nodes", segments, before, exchange, after))


def _regions(lanes: Lanes, nbytes: int) -> list[slice]:
    """Where the blocks of each node's ranks lie in the result, in bytes."""
    counts = Counter(lanes.topology.placement.nodes)
    ends = np.cumsum([counts[node] * nbytes for node in range(len(counts))]).tolist()
    return [slice(end - counts[node] * nbytes, end) for node, end in enumerate(ends)]
