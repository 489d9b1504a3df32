"""Broadcast by lanes: root's node gets the data, its leaders bring slices to those of other nodes, nodes gather them.

All is sent from where the data lie, and received where the data are wanted.
"""

from __future__ import annotations

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives.lanes import direct, pipeline
from mpidl.collectives.lanes.pipeline import LaneCall, Lanes, Stages, node_of, signature_of_part
from mpidl.collectives.lanes.transport import Transport, Values
from mpidl.collectives.tasks import Completed, Reduction, Task

_LINE = 64  # bytes


def broadcast(lanes: Lanes, signature: tuple[int, int], memory: ArrayView, root: int) -> LaneCall:
    """Starts a broadcast.

    Args:
        lanes: whose leaders exchange.
        signature: of the call, alike on all ranks.
        memory: root's data, or where they go; of any dtype.
        root: whose data.
    """
    node, flat = node_of(lanes), view.as_numpy(memory).view(np.uint8)
    parts = lanes.parts(flat.size, pipeline.SLICE * lanes.number, _LINE)
    nodes = lanes.topology.placement.nodes
    home = [rank for rank, number in enumerate(nodes) if number == nodes[root]]  # root's node
    at_home = lanes.topology.rank in home
    root_node = next((place for place, rank in enumerate(lanes.peers) if rank in home), 0)

    def own_slice(index: int) -> Values:
        return flat[lanes.own_slice(parts[index])]

    def before(index: int) -> Reduction:
        if not at_home:
            return Completed()
        start, count, _ = parts[index]
        part = view.view(flat[start : start + count])
        return node.broadcast(signature_of_part(signature, index), part, home.index(root))

    def exchange(transport: Transport, index: int) -> Task:
        yield from direct.broadcast(transport, own_slice(index), root_node)

    def after(index: int) -> list[Reduction]:
        if at_home:
            return []
        part = signature_of_part(signature, index)
        return [node.allgather_part(part, view.view(own_slice(index)), parts[index], view.view(flat))]

    return lanes.start(Stages("a broadcast across nodes", len(parts), before, exchange, after))
