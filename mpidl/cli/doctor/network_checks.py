"""`mpidl doctor` on what lies between ranks: one-sided MPI, latency and bandwidth, in a node and between nodes.

The figures are what training gets: polled waits, through Python. `benchmarks/` measures with more care.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpidl.cli.doctor.finding import Finding, everywhere

if TYPE_CHECKING:
    import numpy as np

    from mpidl.collectives.communicator import Communicator
    from mpidl.mpi.topology import Topology

_ASLEEP = 0.5  # seconds that a rank stays outside MPI while the others write to it
_FAR = 1 << 13  # elements of float64, 64 KiB, that ranks of other nodes add meanwhile
_ROUND_TRIPS = 50
_MESSAGES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes; larger ones are tried while a round trip is short
_LONG = 0.05  # seconds
# What a figure must at least be: half a Gbit Ethernet, and memory that is not reached through the network.
_BETWEEN_NODES = (1e-3, 60e6)  # seconds, bytes/s
_IN_NODES = (1e-3, 500e6)


def one_sided(world: Communicator) -> Finding:
    """Accumulate, read and fetch-and-add on every pair of neighbours, and towards a rank that is outside MPI."""
    import numpy as np

    from mpidl.one_sided.window import Window

    window = Window(world.topology, 1024, "int64", "mpidl doctor's window")
    window.fill(np.zeros(1024, np.int64))
    waited = _while_rank_0_is_away(world, lambda: window.fetch_add(0, 0, 1))
    right = (world.rank + 1) % world.size
    window.add(right, 1, np.arange(1, 1024, dtype=np.int64) * (world.rank + 1))
    window.flush(right)
    world.barrier()
    found = np.empty(1024, np.int64)
    window.read(world.rank, 0, found)
    window.flush(world.rank)
    left = (world.rank - 1) % world.size
    sound = bool((found[1:] == np.arange(1, 1024) * (left + 1)).all())
    counted = window.fetch_add(0, 0, 0) == world.size
    window.close()
    remedy = "workers will wait for each other"
    return _one_sided_finding(world, "one-sided MPI", sound and counted, waited, f"{world.size} rank(s)", remedy=remedy)


def one_sided_between_nodes(world: Communicator) -> Finding | None:
    """64 KiB accumulated by every rank of another node towards rank 0, which is outside MPI."""
    import numpy as np

    from mpidl.one_sided.window import Window

    nodes = world.topology.placement.nodes
    if world.nodes == 1:
        return None
    window = Window(world.topology, _FAR if world.rank == 0 else 0, "float64", "mpidl doctor's window between nodes")
    window.fill(np.zeros(_FAR if world.rank == 0 else 0))
    given = np.full(_FAR, world.rank + 1.0)

    def accumulate() -> None:
        if nodes[world.rank] != nodes[0]:
            window.add(0, 0, given)
            window.flush(0)

    waited = _while_rank_0_is_away(world, accumulate)
    found = np.empty(_FAR)
    window.read(0, 0, found)
    window.flush(0)
    window.close()
    far = [rank for rank in range(world.size) if nodes[rank] != nodes[0]]
    sound = bool((found == sum(rank + 1 for rank in far)).all())
    what = f"64 KiB from each of {len(far)} rank(s)"
    remedy = "workers rely on the others' progress threads; ranks that only serve answer sooner (mpidl train --servers)"
    return _one_sided_finding(world, "one-sided between nodes", sound, waited, what, remedy=remedy)


def _while_rank_0_is_away(world: Communicator, act: Callable[[], object]) -> float:
    """Each rank acts on rank 0 while rank 0 sleeps, which then does the same; returns this rank's seconds for it."""
    world.barrier()
    if world.rank == 0:
        time.sleep(_ASLEEP)
    began = time.perf_counter()
    act()
    seconds = time.perf_counter() - began
    world.barrier()
    return seconds


def _one_sided_finding(
    world: Communicator, subject: str, sound: bool, waited: float, what: str, *, remedy: str
) -> Finding:
    results = everywhere(world, {"sound": sound, "waited": waited})
    if not all(one["sound"] for one in results):
        return Finding(
            "FAIL", subject, "updates were lost: the asynchronous algorithms cannot be used with this MPI and network"
        )
    longest = max(one["waited"] for one in results)
    if longest > _ASLEEP / 2:
        return Finding(
            "WARN",
            subject,
            f"right, but a rank outside MPI kept others waiting for {longest:.2f} s: {remedy}",
        )
    return Finding("ok", subject, f"{what}, right; {longest * 1e3:.1f} ms towards a sleeping rank")


def speed_in_nodes(world: Communicator) -> Finding | None:
    """Latency and bandwidth between the first two ranks of each node; the slowest pair counts."""
    members = _ranks_of_nodes(world)
    pairs = [(ranks[0], ranks[1]) for ranks in members if len(ranks) > 1]
    if not pairs:
        return None
    hint = "is shared memory off in this MPI (UCX_TLS without sm, OMPI_MCA_btl without sm), or are the cores busy?"
    return _speed_finding("speed in a node", _measured(world, [pairs]), _IN_NODES, hint)


def speed_between_nodes(world: Communicator) -> Finding | None:
    """Latency and bandwidth between the first ranks of neighbouring nodes; the slowest pair counts."""
    first = [ranks[0] for ranks in _ranks_of_nodes(world)]
    if len(first) == 1:
        return None
    pairs = list(itertools.pairwise(first))
    # Every second pair at a time: a rank is in one pair only.
    hint = "does MPI use the network meant for it (UCX_NET_DEVICES, OMPI_MCA_btl_tcp_if_include in jobs/site.sh)?"
    return _speed_finding("speed between nodes", _measured(world, [pairs[::2], pairs[1::2]]), _BETWEEN_NODES, hint)


def _ranks_of_nodes(world: Communicator) -> list[list[int]]:
    nodes = world.topology.placement.nodes
    return [[rank for rank in range(world.size) if nodes[rank] == node] for node in range(world.nodes)]


def _measured(world: Communicator, turns: list[list[tuple[int, int]]]) -> dict[tuple[int, int], tuple[float, float]]:
    """Measures pairs, those of one turn at the same time; returns seconds and bytes/s of each; a collective."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for tag, pairs in enumerate(turns):
        mine = next((pair for pair in pairs if world.rank in pair), None)
        figures = None
        if mine is not None:
            ranks = world.topology.subset(mine, "mpidl doctor's pair", tag)
            figures = [_latency(ranks), _bandwidth(ranks)]
            ranks.free()
        results = everywhere(world, figures)
        found |= {pair: tuple(results[pair[0]]) for pair in pairs}
    return found


def _latency(ranks: Topology) -> float:
    """Seconds that 8 bytes take one way: half of the median round trip."""
    import numpy as np

    word = np.zeros(1, np.int64)
    _round_trip(ranks, word)
    return float(np.median([_round_trip(ranks, word) for _ in range(_ROUND_TRIPS)])) / 2


def _bandwidth(ranks: Topology) -> float:
    """Bytes/s one way, by the better of two round trips of the largest message that does not take long."""
    import numpy as np

    best = 0.0
    for nbytes in _MESSAGES:
        message = np.ones(nbytes, np.uint8)
        seconds = min(_round_trip(ranks, message) for _ in range(2))
        # Both must stop at the same size.
        slower = float(ranks.gather_words(np.array([seconds]), "mpidl doctor").max())
        best = max(best, 2 * nbytes / slower)
        if slower > _LONG:
            break
    return best


def _round_trip(ranks: Topology, message: np.ndarray[Any, Any]) -> float:
    """Seconds for a message from rank 0 to rank 1 and back; between two ranks a broadcast is a message."""
    from mpidl.arrays.view import view
    from mpidl.mpi.topology import wait_all

    memory = view(message)
    began = time.perf_counter()
    for root in (0, 1):
        wait_all(ranks, ranks.start_broadcast(memory, root), "mpidl doctor", ranks.begin(), message)
    return time.perf_counter() - began


def _speed_finding(
    subject: str, found: dict[tuple[int, int], tuple[float, float]], least: tuple[float, float], hint: str
) -> Finding:
    slow, narrow = max(found, key=lambda pair: found[pair][0]), min(found, key=lambda pair: found[pair][1])
    latency, bandwidth = found[slow][0], found[narrow][1]
    text = f"{latency * 1e6:.0f} us, {bandwidth / 1e9:.2f} GB/s"
    if len(found) > 1:
        text += f" at worst of {len(found)} pairs (ranks {slow[0]} and {slow[1]}, {narrow[0]} and {narrow[1]})"
    if latency > least[0] or bandwidth < least[1]:
        return Finding("WARN", subject, f"{text}: {hint}")
    return Finding("ok", subject, text)
