"""How a center is held, decided once for all of it before it is made: *node*, *active_message* or *rma*.

*node* where all ranks that reach the center are on one node: shared memory. Between nodes *active_message*, where ranks
of other nodes send active messages that a thread or a dedicated server answers, or *rma*, where MPI does it: the one
that a trial on a small center finds faster, or the one that `MPIDL_CENTER` names. What each does is in `center`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mpidl.errors import ArgumentError
from mpidl.mpi import exit_protocol, runtime, shared_memory
from mpidl.mpi.topology import Topology
from mpidl.native import environment
from mpidl.one_sided import locked_array

NODE, ACTIVE_MESSAGE, RMA = "node", "active_message", "rma"
SWITCH = environment.CENTER.name
_HOPELESS = 20.0  # times as slow at its first exchange a protocol is not tried again,
_ENOUGH = 1.0  # if that took so many seconds: connections are made in it
_said: set[str] = set()
Trial = Callable[[str, float], float]


def choose(ranks: Topology, everyone: Topology, trial: Trial) -> str:
    """Returns the protocol, alike on all ranks; a collective.

    Args:
        ranks: the workers.
        everyone: the workers and their dedicated servers, if they have any.
        trial: returns the seconds that a protocol takes on this rank, and gives the protocol up if its first exchange
            takes longer than a limit; a collective.

    Raises:
        ArgumentError: MPIDL_CENTER has no meaning, or asks for a protocol that cannot be; alike on all ranks.
    """
    wish = _agreed_wish(ranks)
    one_node = locked_array.possible(everyone)
    if one_node and wish == "":
        return NODE if shared_memory.all_want_it(ranks) else RMA
    if wish == RMA:
        return RMA
    answering = everyone.size > ranks.size or _all_have_threads(ranks)
    if wish == ACTIVE_MESSAGE and not answering:
        raise ArgumentError(f"{SWITCH}={wish} needs an MPI that was started with thread level multiple on every rank")
    shares = one_node or shared_memory.all_want_it(ranks)  # on one node each rank has memory of its own then
    if wish == ACTIVE_MESSAGE and not shares:
        raise ArgumentError(f"{SWITCH}={wish} shares memory within nodes, and {shared_memory.SWITCH}=0 forbids it")
    if wish == ACTIVE_MESSAGE:
        return ACTIVE_MESSAGE
    return _faster(ranks, trial) if answering and shares else RMA


def _agreed_wish(ranks: Topology) -> str:
    wishes = [text.decode() for text in ranks.gather_bytes(environment.CENTER.text().encode(), f"agreeing on {SWITCH}")]
    found = []
    for rank, wish in enumerate(wishes):
        try:
            found.append(environment.CENTER.read({SWITCH: wish}))
        except ArgumentError as error:
            raise ArgumentError(f"rank {rank}: {error}") from None
        if found[rank] != found[0]:
            raise ArgumentError(f"{SWITCH} is {wishes[0]!r} on rank 0 and {wish!r} on rank {rank}: set it alike")
    return found[0]


def _all_have_threads(ranks: Topology) -> bool:
    has = runtime.mpi_description()["thread_level"] == "multiple"
    return bool(ranks.gather_words(np.array([has], np.int64), "agreeing on threads").all())


def _faster(ranks: Topology, trial: Trial) -> str:
    messages = _slowest(ranks, trial(ACTIVE_MESSAGE, math.inf))
    limit = max(_ENOUGH, _HOPELESS * messages)
    rma = _slowest(ranks, trial(RMA, limit))
    chosen = ACTIVE_MESSAGE if messages < rma else RMA
    if ranks.rank == 0 and chosen not in _said:
        _said.add(chosen)
        exit_protocol.say(
            f"the center is reached by {chosen}: commit and pull of 1 MiB took {messages * 1e3:.1f} ms by "
            f"{ACTIVE_MESSAGE}, {rma * 1e3:.1f} ms by {RMA}{' at the first try' if rma > limit else ''}; {SWITCH} "
            "decides otherwise"
        )
    return chosen


def _slowest(ranks: Topology, seconds: float) -> float:
    return float(ranks.gather_words(np.array([seconds]), "comparing protocols").max())


def hosts_of(protocol: str, everyone: Topology) -> tuple[int, ...]:
    """Returns a number for each rank; ranks with the same number reach the same memory directly."""
    nodes = everyone.placement.nodes
    return tuple(range(everyone.size)) if protocol == ACTIVE_MESSAGE and len(set(nodes)) == 1 else nodes
