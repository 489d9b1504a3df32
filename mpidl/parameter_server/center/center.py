"""The center variable and its operations, in three protocols; which one is decided when it is made, for all of it.

*node*, where all ranks are on one node: the center lies in memory that they share, and each block of it is changed and
read under its lock. *active_message*, between nodes: each node's shards lie in its memory likewise; a rank of another
node sends what is to be added as an active message, and a thread of the owner, or a dedicated server, adds it and
answers. *rma*: a commit and its pull are one `MPI_Get_accumulate(SUM)`, a commit by itself is `MPI_Accumulate(SUM)` and
a pull `MPI_Get_accumulate(NO_OP)`, atomic per element and served by MPI while the owner computes. No protocol loses a
commit. Rules that must read and write the center in one step exchange shard by shard under a lock. What a worker
commits is decided by its algorithm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpidl.mpi import executor
from mpidl.mpi.topology import Topology
from mpidl.mpi.waiting import Lookout
from mpidl.one_sided.dedicated_servers import DedicatedServers
from mpidl.one_sided.message_server import MessageServer
from mpidl.optim.flat import Few, Flat
from mpidl.parameter_server.center import arrays
from mpidl.parameter_server.center import protocol as protocols
from mpidl.parameter_server.center.arrays import plan_of
from mpidl.parameter_server.center.clock import Clock
from mpidl.parameter_server.center.node_array import NodeArray
from mpidl.parameter_server.center.progress_thread import Progress, start_progress
from mpidl.parameter_server.center.remote_array import RemoteArray
from mpidl.parameter_server.center.sharding import shard
from mpidl.parameter_server.center.ticket_lock import Locks

Exchanged = tuple[int, int]
_TRIALS = 4  # exchanges by which protocols are compared; the first one warms up


@dataclass(frozen=True)
class Requirements:
    """What an algorithm needs of the center besides its elements and the clock."""

    locks: bool = False  # of the shards, for `exchange`
    sums: bool = False  # an array like the center, zeros at first, for `add_to_sums`


class Center:
    """A flat variable in shards, which workers commit to and pull from; making it is a collective of the workers.

    Args:
        ranks: the workers.
        initial: the whole variable, equal on all ranks, one-dimensional, float32 or float64.
        name: for messages.
        servers: the dedicated servers of these workers, which then hold all shards and the clock; None: the workers
            hold them, each a shard.
        needs: what else is held, shard by shard, on the same ranks.
        protocol: "node", "active_message" or "rma"; None: chosen here.
    """

    def __init__(
        self,
        ranks: Topology,
        initial: Flat,
        name: str,
        servers: DedicatedServers | None = None,
        needs: Requirements = Requirements(),
        *,
        protocol: str | None = None,
    ) -> None:
        self._name, self._servers = name, servers
        owners = servers.servers if servers is not None else range(ranks.size)
        size = max(ranks.size, owners.stop)
        shards = shard(initial.size, len(owners), owners.start)
        # Workers begin with different shards and go on to the right, so that they spread over the owners.
        first = ranks.rank % len(shards)
        self._order = shards[first:] + shards[:first]
        self._mine = shards[ranks.rank :: ranks.size]  # to write where all workers know the values
        clock = Clock.plan(name, size, owners.start, ranks.size)
        everyone = servers.whole if servers is not None else ranks
        if protocol is None:
            protocol = protocols.choose(ranks, everyone, lambda one, limit: _trial(ranks, servers, one, limit))
        hosts = protocols.hosts_of(protocol, everyone)
        center, with_it = (
            plan_of(f"the {what} of {name}", initial.dtype.name, shards, protocol, hosts) for what in ("center", "sums")
        )
        locks = [Locks.plan(name, size, owners)] if needs.locks else []
        sums = [with_it] if needs.sums else []
        self._workers, plans = ranks, (clock, center, *locks, *sums)
        self._ranks = servers.open(name, plans) if servers is not None else ranks  # all that hold or reach the center
        self._lookout = Lookout(self._ranks.channel, "")
        self._where = f"the center of {name} lies on rank(s) {', '.join(map(str, owners))}"
        self.clock = Clock(self._ranks, clock, owners.start, ranks.size)
        self._center = arrays.make(self._ranks, center, self._order, self.look, hosts=hosts)
        self._locks = Locks(self._ranks, locks[0], self.look) if locks else None
        self._sums = arrays.make(self._ranks, sums[0], self._order, self.look, hosts=hosts) if sums else None
        self._messages = self._serve_messages()
        self._held = center.counts[self._ranks.rank] > 0 or self._ranks.rank == owners.start
        self._progress: Progress | None = None
        self.start_progress()
        self._write(initial)
        ranks.barrier(f"opening the center of {name}")  # no commit may come before its elements were written

    def _write(self, values: Flat) -> None:
        """Gives the center its values; all workers know them and share the writing."""
        for part in self._mine:
            self._center.write(part, values[part.start : part.start + part.count])
        self._center.flush()

    def _serve_messages(self) -> MessageServer | None:
        """Makes this rank's server of active messages, if the protocol sends any."""
        messaged = [array for array in (self._center, self._sums) if isinstance(array, RemoteArray)]
        if not messaged:
            return None
        server = MessageServer(self._ranks, [array.blocks for array in messaged], self._name, self.look)
        for number, array in enumerate(messaged):
            array.join(server, number)
        return server

    @property
    def protocol(self) -> str:
        """Returns "node", "active_message" or "rma"."""
        kinds = {NodeArray: protocols.NODE, RemoteArray: protocols.ACTIVE_MESSAGE}
        return kinds.get(type(self._center), protocols.RMA)

    def commit(self, delta: Flat, short: Few | None = None, number: int | None = None) -> int:
        """Adds `delta` to the center and returns the commit's number: how many commits began before it.

        Args:
            delta: flat, of the center's dtype.
            short: what rounding leaves out of `delta`; only a worker that is alone since its pull knows it.
            number: from `clock.begin()`, if `delta` depends on it; None: taken here.
        """
        if number is None:
            number = self.clock.begin()
        self._center.add(delta)
        if short is not None:
            self._center.add_few(short)
        self._center.flush()
        self.clock.land()  # only now: a worker that reads this count must find the data
        return number

    def pull(self, out: Flat) -> int:
        """Copies the center into `out` and returns a clock: every commit that it counts is in the copy."""
        landed = self.clock.landed()  # before the data: later commits may be in the copy, counted ones must be
        self._center.read(out)
        return landed

    def commit_and_pull(
        self, delta: Flat, out: Flat, *, scale: float = 1.0, short: Few | None = None, number: int | None = None
    ) -> Exchanged:
        """Commits `delta * scale` and pulls, in one pass over the center.

        Args as `commit`, and:
            out: receives the center, which holds this commit.
            scale: 1 with `short`.

        Returns:
            The commit's number, and a clock: this commit, and every other one that it counts, is in `out`.
        """
        if number is None:
            number = self.clock.begin()
        landed = self.clock.landed()  # before the data, as in `pull`
        self._center.add_and_pull(delta, scale, out)
        if short is not None and short.at.size:
            self._center.add_few(short)
            self._center.flush()
            out[short.at] += short.values[short.at]  # others may have committed meanwhile, and stay in it
        self.clock.land()
        return number, landed + 1

    def exchange(self, change: Callable[[slice, Flat], Flat], out: Flat) -> Exchanged:
        """Commits and pulls in one step for each shard, which no other worker reads or writes meanwhile.

        Args:
            change: is given a shard's place in the flat variable and its elements, and returns what they become.
            out: receives the center as it is afterwards.

        Returns:
            The commit's number, and a clock: this commit, and every other one that it counts, is in `out`.
        """
        assert self._locks is not None
        landed = self.clock.landed()
        number = self.clock.begin()
        for part in self._order:
            if part.count:
                here = slice(part.start, part.start + part.count)
                with self._locks.held(part.owner):
                    self._center.read_shard(part, out[here])
                    out[here] = change(here, out[here])
                    self._center.replace(part, out[here])  # before the lock goes: the next worker must find it
        self.clock.land()
        return number, landed + 1

    def add_to_sums(self, values: Flat) -> Flat:
        """Adds to the sums that lie with the center and returns what they were before, in one step for each element."""
        assert self._sums is not None
        return self._sums.add_and_read(values)

    def sums(self) -> Flat | None:
        """Returns a copy of the sums; None if there are none."""
        if self._sums is None:
            return None
        copied = np.empty(sum(part.count for part in self._order), self._sums.dtype)
        self._sums.read(copied)
        return copied

    def restore(self, clock: int, residual: Flat | None, sums: Flat | None = None) -> None:
        """Makes a variable that was just made go on from a saved one; by one rank, before any commit or pull.

        Args:
            clock: commits in the saved variable.
            residual: saved minus initial, where the initial one was rounded; the sum is exact.
            sums: the saved sums.
        """
        if residual is not None:
            self._center.add_few(Few(residual, np.flatnonzero(residual)))
            self._center.flush()
        if sums is not None and self._sums is not None:
            self._sums.add(sums)
            self._sums.flush()
        self.clock.advance(clock)

    def overwrite(self, values: Flat) -> None:
        """Gives the center other values, alike on all workers; a collective, while no exchange is under way."""
        self._write(values)
        self._workers.barrier(f"overwriting the center of {self._name}")

    def look(self) -> None:
        """Looks for ranks that have died; between exchanges nothing else would tell.

        Raises:
            ExecutorEndedError: on an executor's thread that is to end.
            RankFailedError: a rank that holds a shard, or works, is gone.
        """
        if not executor.under_way():  # the main thread looks, while it waits for the future
            self._lookout.look(f"{self._name} cannot go on ({self._where})")

    def start_progress(self) -> None:
        """Starts the progress thread where one is needed and none runs."""
        if self._progress is None and self._held:
            self._progress = start_progress(self._ranks, self._name, self._messages)

    def end_progress(self) -> None:
        """Ends the progress thread, where there is one; harmless the second time."""
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.end()

    def close(self) -> None:
        """Gives the windows back; a collective of the workers."""
        if self._messages is not None:
            self._workers.barrier(f"closing {self._name}")  # until then others may send to this rank
        self.end_progress()
        if self._servers is not None:
            self._servers.close(self._ranks)
        if self._messages is not None:
            self._messages.close()
        for held in (self._sums, self._locks, self._center, self.clock):  # the last that was opened first
            if held is not None:
                held.close()
        if self._servers is not None:
            self._ranks.free()


def _trial(ranks: Topology, servers: DedicatedServers | None, protocol: str, limit: float) -> float:
    """Returns the seconds of a commit and its pull of 1 MiB by all workers at once; a collective of them.

    Args:
        ranks, servers, protocol: as `Center`.
        limit: seconds; a protocol whose first exchange takes longer on some rank is not tried again.
    """
    initial = np.zeros(1 << 18, np.float32)
    center = Center(ranks, initial, "a trial", servers, protocol=protocol)
    out, times = np.empty_like(initial), []
    for number in range(_TRIALS):
        ranks.barrier("a trial")
        started = time.perf_counter()
        center.commit_and_pull(initial, out)
        times.append(time.perf_counter() - started)
        if number == 0 and ranks.gather_words(np.array(times), "a trial").max() > limit:
            break
    center.close()
    return statistics.median(times[1:] or times)
