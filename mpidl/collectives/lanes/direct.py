"""Between a few nodes: everybody sends each other what that one needs, in one round of messages for each half.

Reduce-scatter: everybody's block for a place, added up there. Allgather: everybody's own block. Allreduce: both, in
this order. Bytes sent per rank: (p - 1) / p of the data in each half, the least possible; messages: p - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpidl.collectives.lanes.transport import Values, Wire, cut
from mpidl.collectives.tasks import Task


def allreduce(wire: Wire, values: Values, op: str, divisor: float) -> Task:
    """Reduces `values` in place over all places, in their order; the same bits arrive everywhere."""
    blocks = cut(values, wire.size)
    yield from _reduce_scatter(wire, blocks, blocks[wire.place], op, divisor)
    wire.as_received(blocks[wire.place])
    yield from allgather_blocks(wire, blocks)


def reduce_scatter(wire: Wire, values: Values, out: Values, op: str, divisor: float) -> Task:
    """Reduces `values`, a block as long as `out` for each place, in their order; writes this one's block to `out`.

    `out` lies apart; what is in `values` afterwards is of no use.
    """
    yield from _reduce_scatter(wire, _equal_blocks(wire, values), out, op, divisor)


def allgather(wire: Wire, values: Values) -> Task:
    """Collects blocks of one length, of which this place's is in `values` already, in the order of places."""
    yield from allgather_blocks(wire, _equal_blocks(wire, values))


def allgather_blocks(wire: Wire, blocks: Sequence[Values]) -> Task:
    """As `allgather`, of blocks of any lengths, wherever they lie."""
    received = [wire.receive(place, blocks[place]) for place in wire.others]
    sent = [wire.send(place, blocks[wire.place]) for place in wire.others]
    yield from received
    yield from sent


def broadcast(wire: Wire, values: Values, root: int) -> Task:
    """Brings root's `values` to all places: each gets a block from there, and sends it to the others."""
    blocks = cut(values, wire.size)
    others = [place for place in wire.others if place != root]
    if wire.place == root:
        sent = [wire.send(place, blocks[place]) for place in others]
        yield from [*sent, *(wire.send(place, blocks[root]) for place in others)]
        return
    first = wire.receive(root, blocks[wire.place])
    received = [wire.receive(place, blocks[place]) for place in wire.others]
    yield first
    sent = [wire.send(place, blocks[wire.place]) for place in others]
    yield from received
    yield from sent


def _reduce_scatter(wire: Wire, blocks: Sequence[Values], out: Values, op: str, divisor: float) -> Task:
    mine = blocks[wire.place]
    sources = [mine if place == wire.place else wire.temporary(mine.size, mine.dtype) for place in range(wire.size)]
    received = [wire.receive(place, sources[place]) for place in wire.others]
    sent = [wire.send(place, blocks[place]) for place in wire.others]
    yield from received
    wire.reduce(sources, out, op, divisor)
    yield from sent  # before the blocks that were sent are overwritten


def _equal_blocks(wire: Wire, values: Values) -> list[Values]:
    share = values.size // wire.size
    return [values[place * share :][:share] for place in range(wire.size)]
