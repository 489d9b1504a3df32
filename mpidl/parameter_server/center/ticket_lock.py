"""A lock for each shard, so that one worker at a time reads it, computes, and writes it back.

Two counters per shard, in a window of their own: the next ticket, and the ticket that is served. A worker that wants
the shard takes a ticket and waits until it is served, so that workers get a shard in the order in which they asked for
it and no worker starves. `MPI_Win_lock` cannot serve here: inside the access epoch, which is open for the whole run,
it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpidl.mpi.topology import Topology
from mpidl.mpi.waiting import Backoff
from mpidl.one_sided.window import Plan

_NEXT, _SERVED = 0, 1


class Locks:
    """The locks of one center; making them is a collective.

    Args:
        ranks: those that can reach the shards.
        plan: as `Locks.plan` gives it.
        look: called while this rank waits; raises if a rank has died, which may have held a lock.
    """

    def __init__(self, ranks: Topology, plan: Plan, look: Callable[[], None]) -> None:
        self._window = plan.make_window(ranks)
        self._look = look

    @staticmethod
    def plan(name: str, size: int, owners: range) -> Plan:
        """Returns what the locks of the shards on the ranks `owners` need of `size` ranks."""
        return Plan(f"the locks of {name}", "int64", tuple(2 if rank in owners else 0 for rank in range(size)))

    @contextmanager
    def held(self, owner: int) -> Iterator[None]:
        """Holds the lock of the shard on rank `owner`; what was started towards it must be flushed before the end."""
        ticket = self._window.fetch_add(owner, _NEXT, 1)
        backoff = Backoff()
        while self._window.fetch_add(owner, _SERVED, 0) != ticket:
            backoff.pause()
            self._look()
        yield
        # Not in a `finally`: a rank that failed half-way leaves a shard that no rank may use, and ends the job.
        self._window.fetch_add(owner, _SERVED, 1)

    def close(self) -> None:
        """Gives the memory back; a collective."""
        self._window.close()
