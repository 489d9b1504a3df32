"""Which of three arrays holds a center, and what it needs of each rank: an RMA window, shared memory, or both shared
memory and active messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidl.mpi.topology import Topology
from mpidl.one_sided.window import Plan, Window
from mpidl.parameter_server.center.node_array import NodeArray
from mpidl.parameter_server.center.protocol import ACTIVE_MESSAGE, NODE
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
    """Makes the array of a plan; a collective.

    Args:
        ranks: those that can reach it.
        plan: as `plan_of` gives it.
        order: the shards, in the order in which this rank goes through them.
        look: called while this rank waits for others; raises if one has died.
        hosts: by rank, as `protocol.hosts_of` gives it.
    """
    made = plan.make(ranks)
    if isinstance(made, Window):
        return RMAArray(made, plan.dtype, order)
    made.look = look
    if plan.reached:
        places, filled = {}, dict.fromkeys(hosts, 0)
        for owner, count in enumerate(plan.counts):
            places[owner] = filled[hosts[owner]]
            filled[hosts[owner]] += count
        here = frozenset(rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank])
        return RemoteArray(made, places=places, order=order, here=here, look=look)
    return NodeArray(made, plan.dtype, order)


def plan_of(name: str, dtype: str, shards: Sequence[Shard], protocol: str, hosts: Sequence[int]) -> Plan:
    """Returns the plan of an array of these shards; `protocol` and `hosts` as in the module `protocol`."""
    found = dict.fromkeys(range(len(hosts)), 0) | {part.owner: part.count for part in shards}
    counts = tuple(found.values())
    if protocol != ACTIVE_MESSAGE:
        return Plan(name, dtype, counts, sum(counts) if protocol == NODE else 0)
    held = dict.fromkeys(hosts, 0)
    for host, count in zip(hosts, counts, strict=True):
        held[host] += count
    reached = tuple(max(1, held[host]) for host in hosts)
    return Plan(name, dtype, counts, reached=reached, alone=len(held) == len(hosts))
