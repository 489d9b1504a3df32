"""Between many nodes, by recursive halving and doubling: few messages, each half or twice as long as the one before.

R. Thakur, R. Rabenseifner, W. Gropp: Optimization of Collective Communication Operations in MPICH, 2005. Places beyond
the largest power of two ("the core") give all they have to a partner in it first, and get what is theirs from it in the
end. Bytes sent per rank: (p - 1) / p of the data in each half; messages: log2(p).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpidl.collectives.lanes.transport import Transport, Values, cut
from mpidl.collectives.tasks import Task

_Runs = Callable[[int, int], list[Values]]  # what belongs to the core's places from one to another, in pieces


def allreduce(transport: Transport, values: Values, op: str, divisor: float) -> Task:
    """Reduces `values` in place over all places, in an order fixed by their number; the same bits arrive everywhere."""
    core = _core(transport)
    if transport.place >= core:
        yield transport.send(transport.place - core, values)
        yield transport.receive(transport.place - core, values)
        return
    yield from _take_in(transport, values, core, op)
    runs = _runs(values, cut(values, core)[0].size, core)
    yield from _halve(transport, runs, core, op, divisor)
    for mine in runs(transport.place, transport.place + 1):
        transport.as_received(mine)
    yield from _double(transport, runs, core)
    if transport.place + core < transport.size:
        yield transport.send(transport.place + core, values)


def reduce_scatter(transport: Transport, values: Values, out: Values, op: str, divisor: float) -> Task:
    """Reduces `values`, a block as long as `out` for each place, in `allreduce`'s order; writes this one's to `out`.

    `out` lies apart; what is in `values` afterwards is of no use.
    """
    core, share = _core(transport), values.size // transport.size
    if transport.place >= core:
        yield transport.send(transport.place - core, values)
        yield transport.receive(transport.place - core, out.view(np.uint8))
        return
    yield from _take_in(transport, values, core, op)
    yield from _halve(transport, _runs(values, share, core), core, op, divisor)
    out[:] = values[transport.place * share :][:share]
    if transport.place + core < transport.size:
        theirs = values[(transport.place + core) * share :][:share]
        yield transport.send(transport.place + core, theirs.view(np.uint8))  # results travel as they are


def allgather(transport: Transport, values: Values) -> Task:
    """Collects blocks of one length, of which this place's is in `values` already, in the order of places."""
    core, share = _core(transport), values.size // transport.size
    if transport.place >= core:
        yield transport.send(transport.place - core, values[transport.place * share :][:share])
        yield transport.receive(transport.place - core, values)
        return
    partner = transport.place + core
    if partner < transport.size:
        yield transport.receive(partner, values[partner * share :][:share])
    yield from _double(transport, _runs(values, share, core), core)
    if partner < transport.size:
        yield transport.send(partner, values)


def _core(transport: Transport) -> int:
    return 1 << (transport.size.bit_length() - 1)


def _runs(values: Values, share: int, core: int) -> _Runs:
    """A place of the core has its own block and, in the end, that of its partner beyond."""

    def runs(first: int, last: int) -> list[Values]:
        both = (values[at * share : (at + last - first) * share] for at in (first, core + first))
        return [run for run in both if run.size]

    return runs


def _take_in(transport: Transport, values: Values, core: int, op: str) -> Task:
    """Adds what the partner beyond the core has."""
    partner = transport.place + core
    if partner < transport.size:
        theirs = transport.temporary(values.size, values.dtype)
        yield transport.receive(partner, theirs)
        transport.reduce([values, theirs], values, op)


def _halve(transport: Transport, runs: _Runs, core: int, op: str, divisor: float) -> Task:
    """Reduces over the core's places; each ends with what belongs to it."""
    first, distance = 0, core // 2
    while distance:
        partner, low = transport.place ^ distance, not transport.place & distance
        mine, theirs = (first, first + distance) if low else (first + distance, first)
        kept, given = runs(mine, mine + distance), runs(theirs, theirs + distance)
        partial = [transport.temporary(run.size, run.dtype) for run in kept]
        received = [transport.receive(partner, run) for run in partial]
        sent = [transport.send(partner, run) for run in given]
        yield from received
        for run, other in zip(kept, partial, strict=True):
            transport.reduce([run, other] if low else [other, run], run, op, divisor if distance == 1 else 1.0)
        yield from sent  # before its memory is overwritten
        first, distance = mine, distance // 2


def _double(transport: Transport, runs: _Runs, core: int) -> Task:
    """The reverse of the movements of `_halve`."""
    distance = 1
    while distance < core:
        mine = transport.place // distance * distance
        theirs = mine ^ distance
        received = [transport.receive(transport.place ^ distance, run) for run in runs(theirs, theirs + distance)]
        sent = [transport.send(transport.place ^ distance, run) for run in runs(mine, mine + distance)]
        yield from received
        yield from sent
        distance *= 2
