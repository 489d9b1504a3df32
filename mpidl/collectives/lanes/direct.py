"""Between a few nodes: everybody sends each other what that one needs, in one round of messages for each half.

Reduce-scatter: everybody's block for a place, added up there. Allgather: everybody's own block. Allreduce: both, in
this order. Bytes sent per rank: (p - 1) / p of the data in each half, the least possible; messages: p - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpidl.collectives.lanes.transport import Transport, Values, cut
from mpidl.collectives.tasks import Task


def allreduce(transport: Transport, values: Values, op: str, divisor: float) -> Task:
    """Reduces `values` in place over all places, in their order; the same bits arrive everywhere."""
    blocks = cut(values, transport.size)
    yield from _reduce_scatter(transport, blocks, blocks[transport.place], op, divisor)
    transport.as_received(blocks[transport.place])
    yield from allgather_blocks(transport, blocks)


def reduce_scatter(transport: Transport, values: Values, out: Values, op: str, divisor: float) -> Task:
    """Reduces `values`, a block as long as `out` for each place, in their order; writes this one's block to `out`.

    `out` lies apart; what is in `values` afterwards is of no use.
    """
    yield from _reduce_scatter(transport, _equal_blocks(transport, values), out, op, divisor)


def allgather(transport: Transport, values: Values) -> Task:
    """Collects blocks of one length, of which this place's is in `values` already, in the order of places."""
    yield from allgather_blocks(transport, _equal_blocks(transport, values))


def allgather_blocks(transport: Transport, blocks: Sequence[Values]) -> Task:
    """As `allgather`, of blocks of any lengths, wherever they lie."""
    received = [transport.receive(place, blocks[place]) for place in transport.others]
    sent = [transport.send(place, blocks[transport.place]) for place in transport.others]
    yield from received
    yield from sent


def broadcast(transport: Transport, values: Values, root: int) -> Task:
    """Brings root's `values` to all places: each gets a block from there, and sends it to the others."""
    blocks = cut(values, transport.size)
    others = [place for place in transport.others if place != root]
    if transport.place == root:
        sent = [transport.send(place, blocks[place]) for place in others]
        yield from [*sent, *(transport.send(place, blocks[root]) for place in others)]
        return
    first = transport.receive(root, blocks[transport.place])
    received = [transport.receive(place, blocks[place]) for place in transport.others]
    yield first
    sent = [transport.send(place, blocks[transport.place]) for place in others]
    yield from received
    yield from sent


def _reduce_scatter(transport: Transport, blocks: Sequence[Values], out: Values, op: str, divisor: float) -> Task:
    mine = blocks[transport.place]
    sources = [
        mine if place == transport.place else transport.temporary(mine.size, mine.dtype)
        for place in range(transport.size)
    ]
    received = [transport.receive(place, sources[place]) for place in transport.others]
    sent = [transport.send(place, blocks[place]) for place in transport.others]
    yield from received
    transport.reduce(sources, out, op, divisor)
    yield from sent  # before the blocks that were sent are overwritten


def _equal_blocks(transport: Transport, values: Values) -> list[Values]:
    share = values.size // transport.size
    return [values[place * share :][:share] for place in range(transport.size)]
