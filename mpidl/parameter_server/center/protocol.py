"""How a center is held, decided once for all of it before it is made: *node*, *mail* or *rma*.

*node* where all that reach it are on one: shared memory. Between nodes, *mail*, where ranks of another node write
letters that a thread or a dedicated server answers, or *rma*, where MPI does it: whichever a trial on a small center
finds faster. `MPIDL_CENTER=mail|rma` decides without a trial. What each does is in `center`.
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

NODE, MAIL, RMA = "node", "mail", "rma"
SWITCH = environment.CENTER.name
_ANY = ("", MAIL, RMA)
_HOPELESS = 20.0  # times as slow at its first exchange a protocol is not tried again,
_ENOUGH = 1.0  # if that took so many seconds: connections are made in it
_said: set[str] = set()
Trial = Callable[[str, float], float]


def choose(ranks: Topology, everyone: Topology, trial: Trial) -> str:
    """Returns the protocol, alike on all ranks; a collective.

    Args:
        ranks: the workers.
        everyone: and their dedicated servers, if they have any.
        trial: returns the seconds that a protocol takes on this rank, and gives it up if the first time takes longer
            than a limit; a collective.

    Raises:
        ArgumentError: MPIDL_CENTER makes no sense, or cannot be; alike on all ranks.
    """
    wish = _agreed_wish(ranks)
    one_node = locked_array.possible(everyone)
    if one_node and wish == "":
        return NODE if shared_memory.all_want_it(ranks) else RMA
    if wish == RMA:
        return RMA
    answering = everyone.size > ranks.size or _all_have_threads(ranks)
    if wish == MAIL and not answering:
        raise ArgumentError(f"{SWITCH}=mail needs an MPI that was started with thread level multiple on every rank")
    shares = one_node or shared_memory.all_want_it(ranks)  # on one node each rank has memory of its own then
    if wish == MAIL and not shares:
        raise ArgumentError(f"{SWITCH}=mail shares memory within nodes, and {shared_memory.SWITCH}=0 forbids it")
    if wish == MAIL:
        return MAIL
    return _faster(ranks, trial) if answering and shares else RMA


def _agreed_wish(ranks: Topology) -> str:
    wishes = [text.decode() for text in ranks.gather_bytes(environment.CENTER.text().encode(), f"agreeing on {SWITCH}")]
    for rank, wish in enumerate(wishes):
        if wish not in _ANY:
            raise ArgumentError(f"{SWITCH}={wish!r} on rank {rank}: expected mail or rma, or nothing")
        if wish != wishes[0]:
            raise ArgumentError(f"{SWITCH} is {wishes[0]!r} on rank 0 and {wish!r} on rank {rank}: set it alike")
    return wishes[0]


def _all_have_threads(ranks: Topology) -> bool:
    has = runtime.mpi_description()["thread_level"] == "multiple"
    return bool(ranks.gather_words(np.array([has], np.int64), "agreeing on threads").all())


def _faster(ranks: Topology, trial: Trial) -> str:
    mail = _slowest(ranks, trial(MAIL, math.inf))
    limit = max(_ENOUGH, _HOPELESS * mail)
    rma = _slowest(ranks, trial(RMA, limit))
    chosen = MAIL if mail < rma else RMA
    if ranks.rank == 0 and chosen not in _said:
        _said.add(chosen)
        exit_protocol.say(
            f"the center is reached by {chosen}: commit and pull of 1 MiB took {mail * 1e3:.1f} ms by mail, "
            f"{rma * 1e3:.1f} ms by rma{' at the first try' if rma > limit else ''}; {SWITCH} decides otherwise"
        )
    return chosen


def _slowest(ranks: Topology, seconds: float) -> float:
    return float(ranks.gather_words(np.array([seconds]), "comparing protocols").max())


def hosts_of(protocol: str, everyone: Topology) -> tuple[int, ...]:
    """Returns by rank whose memory it reaches directly: that of those with the same number."""
    nodes = everyone.placement.nodes
    return tuple(range(everyone.size)) if protocol == MAIL and len(set(nodes)) == 1 else nodes
