"""Which calls between nodes lanes can carry out, and how they are started.

MPI has what lies on a device, what csrc/node/schedule.c does not reduce (complex numbers), and what does not fit
the lanes: a reduce-scatter where nodes have unequally many ranks, an allgather where the ranks of a node do not follow
each other.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from mpidl.arrays.packing import Table
from mpidl.arrays.view import ArrayView
from mpidl.collectives.gather_list import GatherList
from mpidl.collectives.lanes import direct, halving_doubling
from mpidl.collectives.lanes.allreduce import allreduce
from mpidl.collectives.lanes.pipeline import LaneCall, Lanes
from mpidl.collectives.lanes.reduce_scatter import reduce_scatter
from mpidl.collectives.lanes.transport import Exchange
from mpidl.mpi.topology import Topology
from mpidl.native import node as _node

EXCHANGES: dict[str, Exchange] = {"direct": direct, "halving_doubling": halving_doubling}


def possible(topology: Topology, kind: str, memory: ArrayView, op: str) -> bool:
    """Whether lanes can carry out an allreduce, reduce_scatter, allgather or broadcast; alike on all ranks."""
    nodes = topology.placement.nodes
    if memory.device != "cpu":
        return False
    if kind == "broadcast":
        return True
    if kind == "allgather":
        return nodes == tuple(sorted(nodes))
    even = kind == "allreduce" or len(set(Counter(nodes).values())) == 1
    return kind in ("allreduce", "reduce_scatter") and even and _node.reduces(memory.dtype, op)


def reduce(
    lanes: Lanes,
    kind: str,
    signature: tuple[int, int],
    send: ArrayView,
    receive: ArrayView,
    *,
    op: str,
    divisor: float,
    exchange: Exchange,
) -> LaneCall:
    """Starts an allreduce or a reduce_scatter of flat memory; `allreduce` says what the arguments are."""
    if kind == "allreduce":
        return allreduce(lanes, signature, send, receive, op=op, divisor=divisor, exchange=exchange)
    nodes, seen, places = lanes.topology.placement.nodes, Counter[int](), list[tuple[int, int]]()
    for rank, node in enumerate(nodes):
        places.append((seen[node], rank))
        seen[node] += 1
    blocks = [rank for _, rank in sorted(places)]  # block r is rank r's
    whole = GatherList(Table((send.count,), (0,)), [send.address], send.dtype, 1.0, send)
    options: dict[str, Any] = {"op": op, "divisor": divisor, "exchange": exchange}
    return reduce_scatter(lanes, signature, whole, receive, blocks=blocks, **options)
