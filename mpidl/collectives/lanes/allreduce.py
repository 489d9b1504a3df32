"""Allreduce by lanes: the node reduces and scatters, leaders exchange their slices, the node gathers the results."""

from __future__ import annotations

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives.gather_list import GatherList
from mpidl.collectives.lanes import pipeline
from mpidl.collectives.lanes.pipeline import LaneCall, Lanes, SliceMemory, Stages, node_of, signature_of_part
from mpidl.collectives.lanes.transport import Exchange, Transport, Values
from mpidl.collectives.tasks import Reduction, Task

_LINE = 16  # elements: a leader's slice of a segment begins at a cache line


def allreduce(
    lanes: Lanes,
    signature: tuple[int, int],
    send: ArrayView | GatherList,
    receive: ArrayView,
    *,
    op: str,
    divisor: float,
    exchange: Exchange,
    wire_dtype: str = "",
) -> LaneCall:
    """Starts an allreduce.

    Args:
        lanes: whose leaders exchange.
        signature: of the call, alike on all ranks.
        send: flat memory, or segments scattered over memory.
        receive: flat; lies apart from `send` or begins where it does.
        op: "sum" and the like.
        divisor: of each result.
        exchange: the algorithm between nodes.
        wire_dtype: in which float32 values travel between nodes; "" for as they are.
    """
    node, memory = node_of(lanes), SliceMemory(lanes.scratch, receive.dtype)
    parts = lanes.parts(receive.count, pipeline.SLICE // receive.itemsize * lanes.number, _LINE)

    def own_slice(index: int) -> Values:
        """This rank's slice of a segment, between the node's reduction and the node's gathering."""
        own = lanes.own_slice(parts[index])
        return memory.of(index, own.stop - own.start)

    def before(index: int) -> Reduction:
        part = signature_of_part(signature, 2 * index)
        return node.reduce_scatter_part(part, send, parts[index], view.view(own_slice(index)), op)

    def exchange_slice(transport: Transport, index: int) -> Task:
        yield from exchange.allreduce(transport, own_slice(index), op, divisor)

    def after(index: int) -> list[Reduction]:
        part = signature_of_part(signature, 2 * index + 1)
        return [node.allgather_part(part, view.view(own_slice(index)), parts[index], receive)]

    stages = Stages("an allreduce across nodes", len(parts), before, exchange_slice, after, wire_dtype, memory)
    return lanes.start(stages)
