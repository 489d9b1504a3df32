"""Allreduce between many nodes by recursive halving and doubling: few messages, each half as long as the one before.

R. Thakur, R. Rabenseifner, W. Gropp: Optimization of Collective Communication Operations in MPICH, 2005. Places beyond
the largest power of two give all they have to a partner first, and get the result from it in the end. Bytes sent per
rank: 2 (p - 1) / p of the data; messages: 2 log2(p).
"""

from __future__ import annotations

from mpidl.collectives.steps import Steps
from mpidl.collectives.wires import Values, Wire


def allreduce(wire: Wire, values: Values, op: str, divisor: float) -> Steps:
    """Reduces `values` in place over all places, in an order fixed by their number; the same bits arrive everywhere."""
    core = 1 << (wire.size.bit_length() - 1)
    partner = wire.place + core
    if wire.place >= core:
        yield wire.send(wire.place - core, values)
        yield wire.receive(wire.place - core, values)
        return
    if partner < wire.size:
        theirs = wire.temporary(values.size, values.dtype)
        yield wire.receive(partner, theirs)
        wire.reduce([values, theirs], values, op)
    yield from _among_power_of_two(wire, values, core, op, divisor)
    if partner < wire.size:
        yield wire.send(partner, values)


def _among_power_of_two(wire: Wire, values: Values, core: int, op: str, divisor: float) -> Steps:
    halves = []
    mine, distance = values, core // 2
    while distance:
        partner = wire.place ^ distance
        middle = (mine.size // 2 + 15) // 16 * 16
        lower, upper = mine[:middle], mine[middle:]
        first = wire.place < partner
        mine, theirs = (lower, upper) if first else (upper, lower)
        partial = wire.temporary(mine.size, mine.dtype)
        received, sent = wire.receive(partner, partial), wire.send(partner, theirs)
        yield received
        sources = [mine, partial] if first else [partial, mine]
        wire.reduce(sources, mine, op, divisor if distance == 1 else 1.0)
        yield sent  # before its memory is overwritten below
        halves.append((partner, mine, theirs))
        distance //= 2
    wire.as_received(mine)
    for partner, mine, theirs in reversed(halves):
        received, sent = wire.receive(partner, theirs), wire.send(partner, mine)
        yield received
        yield sent
