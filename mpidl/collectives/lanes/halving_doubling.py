"""Between many nodes, by recursive halving and doubling: few messages, each half or twice as long as the one before.

R. Thakur, R. Rabenseifner, W. Gropp: Optimization of Collective Communication Operations in MPICH, 2005. Places beyond
the largest power of two ("the core") give all they have to a partner in it first, and get what is theirs from it in the
end. Bytes sent per rank: (p - 1) / p of the data in each half; messages: log2(p).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpidl.collectives.lanes.transport import Values, Wire, cut
from mpidl.collectives.tasks import Task

_Runs = Callable[[int, int], list[Values]]  # what belongs to the core's places from one to another, in pieces


def allreduce(wire: Wire, values: Values, op: str, divisor: float) -> Task:
    """Reduces `values` in place over all places, in an order fixed by their number; the same bits arrive everywhere."""
    core = _core(wire)
    if wire.place >= core:
        yield wire.send(wire.place - core, values)
        yield wire.receive(wire.place - core, values)
        return
    yield from _take_in(wire, values, core, op)
    runs = _runs(values, cut(values, core)[0].size, core)
    yield from _halve(wire, runs, core, op, divisor)
    for mine in runs(wire.place, wire.place + 1):
        wire.as_received(mine)
    yield from _double(wire, runs, core)
    if wire.place + core < wire.size:
        yield wire.send(wire.place + core, values)


def reduce_scatter(wire: Wire, values: Values, out: Values, op: str, divisor: float) -> Task:
    """Reduces `values`, a block as long as `out` for each place, in `allreduce`'s order; writes this one's to `out`.

    `out` lies apart; what is in `values` afterwards is of no use.
    """
    core, share = _core(wire), values.size // wire.size
    if wire.place >= core:
        yield wire.send(wire.place - core, values)
        yield wire.receive(wire.place - core, out.view(np.uint8))
        return
    yield from _take_in(wire, values, core, op)
    yield from _halve(wire, _runs(values, share, core), core, op, divisor)
    out[:] = values[wire.place * share :][:share]
    if wire.place + core < wire.size:
        theirs = values[(wire.place + core) * share :][:share]
        yield wire.send(wire.place + core, theirs.view(np.uint8))  # results travel as they are


def allgather(wire: Wire, values: Values) -> Task:
    """Collects blocks of one length, of which this place's is in `values` already, in the order of places."""
    core, share = _core(wire), values.size // wire.size
    if wire.place >= core:
        yield wire.send(wire.place - core, values[wire.place * share :][:share])
        yield wire.receive(wire.place - core, values)
        return
    partner = wire.place + core
    if partner < wire.size:
        yield wire.receive(partner, values[partner * share :][:share])
    yield from _double(wire, _runs(values, share, core), core)
    if partner < wire.size:
        yield wire.send(partner, values)


def _core(wire: Wire) -> int:
    return 1 << (wire.size.bit_length() - 1)


def _runs(values: Values, share: int, core: int) -> _Runs:
    """A place of the core has its own block and, in the end, that of its partner beyond."""

    def runs(first: int, last: int) -> list[Values]:
        both = (values[at * share : (at + last - first) * share] for at in (first, core + first))
        return [run for run in both if run.size]

    return runs


def _take_in(wire: Wire, values: Values, core: int, op: str) -> Task:
    """Adds what the partner beyond the core has."""
    partner = wire.place + core
    if partner < wire.size:
        theirs = wire.temporary(values.size, values.dtype)
        yield wire.receive(partner, theirs)
        wire.reduce([values, theirs], values, op)


def _halve(wire: Wire, runs: _Runs, core: int, op: str, divisor: float) -> Task:
    """Reduces over the core's places; each ends with what belongs to it."""
    first, distance = 0, core // 2
    while distance:
        partner, low = wire.place ^ distance, not wire.place & distance
        mine, theirs = (first, first + distance) if low else (first + distance, first)
        kept, given = runs(mine, mine + distance), runs(theirs, theirs + distance)
        partial = [wire.temporary(run.size, run.dtype) for run in kept]
        received = [wire.receive(partner, run) for run in partial]
        sent = [wire.send(partner, run) for run in given]
        yield from received
        for run, other in zip(kept, partial, strict=True):
            wire.reduce([run, other] if low else [other, run], run, op, divisor if distance == 1 else 1.0)
        yield from sent  # before its memory is overwritten
        first, distance = mine, distance // 2


def _double(wire: Wire, runs: _Runs, core: int) -> Task:
    """The reverse of the movements of `_halve`."""
    distance = 1
    while distance < core:
        mine = wire.place // distance * distance
        theirs = mine ^ distance
        received = [wire.receive(wire.place ^ distance, run) for run in runs(theirs, theirs + distance)]
        sent = [wire.send(wire.place ^ distance, run) for run in runs(mine, mine + distance)]
        yield from received
        yield from sent
        distance *= 2
