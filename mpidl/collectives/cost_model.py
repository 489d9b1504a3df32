"""Which algorithm carries out a collective between nodes: a cost model, with the link's two constants measured once.

All ranks must choose alike, so the constants are measured between two ranks and told to all. Bits depend on the choice:
it is kept with a checkpoint, and MPIDL_DETERMINISTIC=1 lets it depend on sizes alone.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.mpi.agreement import gather_switch
from mpidl.mpi.placement import Link
from mpidl.mpi.topology import Topology, wait_all
from mpidl.native import environment

ALGORITHMS = ("mpi", "direct", "halving_doubling")
_USUAL = Link(latency=20e-6, per_byte=1 / 1.25e9, measured=False)  # 10 Gbit/s over TCP
# From two nodes of one machine, with 1 and 2 ranks each, on both MPIs, links shaped to 1 Gbit/s and not shaped at all.
_START = 150e-6  # seconds that lanes need beside the network: the jobs of a node, and Python around them
_MESSAGE = 10e-6  # seconds of a processor for each message
_LANES_WORK, _MPI_WORK = 1.5e-9, 0.7e-9  # seconds of a processor for each byte; that of lanes goes on beside the link
_MPI_EXCESS = 1.15  # waits between messages, and bytes on the link beyond what `_sent_by_mpi` says
_TIE = 1e-9  # seconds: of equals the simpler one
_NARROW_FROM = 1 << 18  # bytes, from which on narrow data are never left to MPI
_TRIES, _SMALL, _LARGE = 5, 8, (1 << 17, 1 << 20)  # messages each way; bytes: a burst may pass faster than the rest
_FASTEST = 1e-11  # seconds per byte: what is measured below is noise
_LIMIT = 0.08  # seconds; a slow link is measured with fewer messages


def link_of(topology: Topology) -> Link:
    """Returns the constants of the link between two nodes, measured on the first call; a collective then.

    Raises:
        ArgumentError: MPIDL_DETERMINISTIC makes no sense on some rank.
    """
    if len(set(topology.placement.nodes)) == 1:
        return _USUAL  # of ranks that exchange data as if they were not on one node
    if topology.link is None:
        deterministic = gather_switch(topology, environment.DETERMINISTIC, "choosing algorithms").any()
        topology.link = _USUAL if deterministic else _measured(topology)
    return topology.link


def choose(topology: Topology, nbytes: int, *, kind: str = "allreduce", narrow: bool = False) -> str:
    """Returns one of `ALGORITHMS`, alike on every rank.

    Args:
        topology: whose ranks.
        nbytes: of all data: what a rank gives to an allreduce or reduce_scatter, or gets from the others.
        kind: one of these three, or "broadcast".
        narrow: whether the data travel in half their bytes, unless by MPI.
    """
    costs = estimates(topology, nbytes, kind=kind, narrow=narrow)
    if narrow and nbytes >= _NARROW_FROM:
        costs.pop("mpi")
    return min(costs, key=costs.__getitem__)


@dataclass(frozen=True)
class Spread:
    """How many ranks lie on how many nodes, and how many of each node lead a slice."""

    nodes: int
    lanes: int
    ranks: int


def choose_exchange(topology: Topology, spread: Spread, nbytes: int, *, narrow: bool = False) -> str:
    """As `choose` for an allreduce, where MPI is no choice and nodes may be what is `spread`."""
    costs = _estimates(link_of(topology), spread, nbytes, narrow=narrow)
    del costs["mpi"]
    return min(costs, key=costs.__getitem__)


def estimates(topology: Topology, nbytes: int, *, kind: str = "allreduce", narrow: bool = False) -> dict[str, float]:
    """Returns the seconds that each of `ALGORITHMS` is expected to take, in their order; arguments as of `choose`."""
    counts = Counter(topology.placement.nodes)
    spread = Spread(len(counts), min(counts.values()), topology.size)
    costs = _estimates(link_of(topology), spread, nbytes, narrow=narrow, kind=kind)
    if kind in ("allgather", "broadcast"):  # the one has no blocks side by side in a segment, the other was not built
        del costs["halving_doubling"]
    return costs


def _estimates(link: Link, spread: Spread, nbytes: int, *, narrow: bool, kind: str = "allreduce") -> dict[str, float]:
    """An allreduce has two halves, which by lanes cost the same; a broadcast hands out what it gathers."""
    nodes, halves = spread.nodes, 2 if kind in ("allreduce", "broadcast") else 1
    core = 1 << (nodes.bit_length() - 1)
    rounds = core.bit_length() - 1
    whole = nbytes * link.per_byte
    sent = whole / 2 if narrow else whole
    message = link.latency + _MESSAGE
    beyond = halves * (message + sent / spread.lanes) if nodes > core else 0.0
    # A node sends so much at least, whoever leads; where links are fast, processors are the bound.
    work = halves / 2 * nbytes * _LANES_WORK
    direct = max(halves * (nodes - 1) / nodes * sent, work)
    halving = max(halves * (core - 1) / core * sent, work)
    steps = halves * (spread.ranks - 1).bit_length() * link.latency
    by_mpi = _MPI_EXCESS * _sent_by_mpi(spread, kind) * whole + halves / 2 * nbytes * _MPI_WORK
    return {
        "mpi": steps + by_mpi,
        "direct": _START + direct + halves * (link.latency + (nodes - 1) * _MESSAGE),
        "halving_doubling": _START + halving + halves * rounds * message + beyond + _TIE,
    }


def _sent_by_mpi(spread: Spread, kind: str) -> float:
    """Bytes on the busiest link for each byte of the data.

    Counted on two nodes with two and three ranks each, from 1 MiB on. An allreduce takes the least, 1.0; a
    reduce-scatter as often the least, 0.5, as a node has ranks (each sends every other its block), or more; an
    allgather 0.75 and 0.84 (MPICH, a ring), or as a reduce-scatter; a broadcast 1.0 (MPICH, a tree), or that for each
    rank.
    """
    least = (spread.nodes - 1) / spread.nodes
    if kind == "broadcast":
        return math.log2(spread.nodes)
    if kind == "reduce_scatter":
        return least * min(spread.lanes, 2)
    return (spread.ranks - 1) / spread.ranks if kind == "allgather" else 2 * least


def _measured(topology: Topology) -> Link:
    """Rank 0 and the first rank of another node send each other messages; all others wait for what they find."""
    nodes = topology.placement.nodes
    other = next(rank for rank, node in enumerate(nodes) if node != nodes[0])
    found = np.zeros(2, np.int64)
    if topology.rank in (0, other):
        latency = _half_round_trip(topology, other, _SMALL)
        for nbytes in _LARGE:
            seconds = _half_round_trip(topology, other, nbytes)
            found[:] = round(latency * 1e12), round(max((seconds - latency) / nbytes, _FASTEST) * 1e18)
            if not _both_go_on(topology, other, seconds < _LIMIT / 20):
                break
    picoseconds, per_byte = topology.gather_words(found, "measuring a link")[0]
    return Link(int(picoseconds) * 1e-12, int(per_byte) * 1e-18)


def _both_go_on(topology: Topology, other: int, wish: bool) -> bool:
    """Rank 0 decides."""
    word = np.array([wish], np.uint8)
    if topology.rank == 0:
        _pass(topology, topology.start_send, word, other)
    else:
        _pass(topology, topology.start_receive, word, 0)
    return bool(word[0])


def _half_round_trip(topology: Topology, other: int, nbytes: int) -> float:
    """Returns the least of several; both ranks agree on how many by a byte that travels along."""
    peer = other if topology.rank == 0 else 0
    memory = np.zeros(nbytes, np.uint8)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) <= _TRIES:
        memory[0] = len(times) > 1 and time.perf_counter() - started > _LIMIT / 2
        before = time.perf_counter()
        if topology.rank == 0:
            _pass(topology, topology.start_send, memory, peer)
            last = bool(memory[0])
            _pass(topology, topology.start_receive, memory, peer)
        else:
            _pass(topology, topology.start_receive, memory, peer)
            last = bool(memory[0])
            _pass(topology, topology.start_send, memory, peer)
        times.append((time.perf_counter() - before) / 2)
        if last:
            break
    return min(times[1:])  # the first may have made the connection


def _pass(topology: Topology, start: Any, memory: np.ndarray[Any, Any], peer: int) -> None:
    request = start(memory.ctypes.data, memory.nbytes, peer, 0)
    wait_all(topology, [request], "measuring a link", topology.channel.sequence, memory)
