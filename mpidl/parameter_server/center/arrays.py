"""Which of the three arrays holds a center, and what it needs of each rank: an RMA window, shared memory, or mail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidl.mpi.topology import Topology
from mpidl.one_sided.window import Plan, Window
from mpidl.parameter_server.center.node_array import NodeArray
from mpidl.parameter_server.center.protocol import MAIL, NODE
from mpidl.parameter_server.center.remote_array import RemoteArray
from mpidl.parameter_server.center.rma_array import RMAArray
from mpidl.parameter_server.center.sharding import Shard


def make(
    ranks: Topology,
    plan: Plan,
    order: Sequence[Shard],
    look: Callable[[], None],
    *,
    hosts: Sequence[int],
) -> RMAArray | NodeArray | RemoteArray:
    """Makes what a plan says; a collective.

    Args:
        ranks: who can reach it.
        plan: as `plan_of` gives it.
        order: the shards, in the order in which this rank goes through them.
        look: called while this rank waits for others; raises if one has died.
        hosts: by rank, as `protocols.hosts_of` gives it.
    """
    made = plan.make(ranks)
    if isinstance(made, Window):
        return RMAArray(made, plan.dtype, order)
    made.look = look
    if plan.mailed:
        places, filled = {}, dict.fromkeys(hosts, 0)
        for owner, count in enumerate(plan.counts):
            places[owner] = filled[hosts[owner]]
            filled[hosts[owner]] += count
        here = frozenset(rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank])
        return RemoteArray(made, places=places, order=order, here=here, look=look)
    return NodeArray(made, plan.dtype, order)


def plan_of(name: str, dtype: str, shards: Sequence[Shard], protocol: str, hosts: Sequence[int]) -> Plan:
    """Returns what such an array needs of the ranks that `hosts` has; see `protocol` for both."""
    found = dict.fromkeys(range(len(hosts)), 0) | {part.owner: part.count for part in shards}
    counts = tuple(found.values())
    if protocol != MAIL:
        return Plan(name, dtype, counts, sum(counts) if protocol == NODE else 0)
    held = dict.fromkeys(hosts, 0)
    for host, count in zip(hosts, counts, strict=True):
        held[host] += count
    reached = tuple(max(1, held[host]) for host in hosts)
    return Plan(name, dtype, counts, mailed=reached, alone=len(held) == len(hosts))
