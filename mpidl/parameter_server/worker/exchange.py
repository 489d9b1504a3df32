"""One exchange of a worker with the center: its commit begins, the commit and the pull are made, and both are counted.

A rule says what is committed (`Worker._commit`); the order of the steps, the counts and the staleness are decided here.
The worker's main thread makes an exchange and waits for it, or `overlap` has the executor's thread make it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

from mpidl.mpi import exit_protocol
from mpidl.mpi.topology import Topology
from mpidl.optim.flat import Few, Flat
from mpidl.parameter_server.center.center import Center
from mpidl.parameter_server.worker.replay import Log, Replay
from mpidl.parameter_server.worker.ssp import SSP
from mpidl.parameter_server.worker.statistics import Statistics

Contribution = TypeVar("Contribution")


class Seen(NamedTuple):
    """The commits that one worker knows of, from which the staleness of its next commit follows.

    Numbers of commits and clocks of the center count the commits of all workers; these counts tell them apart.
    """

    own: int = 0  # commits that this worker made
    others: int = 0  # commits of other workers in the center that this worker's parameters come from
    oldest: int = 0  # the same when the oldest gradient since this worker's last commit was taken

    def committed(self) -> Seen:
        """Returns the counts after one more commit of this worker."""
        return self._replace(own=self.own + 1)

    def pulled(self, clock: int) -> Seen:
        """Returns the counts after a pull at this clock, which counts all commits that this worker has made."""
        return self._replace(others=clock - self.own)

    def window_begun(self) -> Seen:
        """Returns the counts at the begin of a window: no gradient has been taken since the last commit."""
        return self._replace(oldest=self.others)

    def staleness(self, number: int) -> int:
        """Returns how many commits of other workers this worker's commit `number` does not know of."""
        return number - self.own - self.oldest

    def fresh(self, number: int) -> bool:
        """Returns whether no other worker has begun a commit between this worker's pull and its commit `number`."""
        return number == self.own + self.others


class Client:
    """One worker as the center's client: what its exchanges go through, and what they came to so far.

    Args:
        center: of this worker's run.
        ranks: the workers.
        spread: exchanges that this worker may be ahead of the slowest one; None: any number.
        log: of a replay; None: exchanges are free.
        statistics: of this worker.
    """

    def __init__(
        self, center: Center, ranks: Topology, spread: int | None, log: Log | None, statistics: Statistics
    ) -> None:
        self.center, self._rank, self.statistics = center, ranks.rank, statistics
        self.ssp = SSP(center.clock, spread, center.look)
        self.replay = None if log is None else Replay(log, center.clock, ranks, center.look)
        self.seen = Seen()  # the main thread's; an exchange has a copy
        self.stop_wished = False  # by this worker, and not passed on to the others yet

    def ordered(self) -> AbstractContextManager[None]:
        """Returns the ordered section: with `MPIDL_REPLAY` one worker at a time is in it, in the log's order."""
        return nullcontext() if self.replay is None else self.replay.ordered()

    @property
    def others_need_it(self) -> bool:
        """Whether other workers wait for the exchanges of this one that a log has."""
        return self.replay is not None and self.replay.follows

    def start_anew(self) -> None:
        """Begins a window from a center on which all workers agree; each calls it while no exchange is under way."""
        self.ssp.join()
        self.took_over(self.seen.pulled(self.center.clock.landed()).others, window_begins=True)

    def pass_stop_request_on(self) -> None:
        """Tells all workers that this one wishes to stop, if it does."""
        if self.stop_wished:
            self.center.clock.request_stop()
            self.stop_wished = False

    def account(self, exchange: Exchange[Any]) -> None:
        """Counts an exchange that has ended; on the main thread."""
        counts, self.seen = self.statistics, self.seen._replace(own=exchange.seen.own)
        counts.bytes += exchange.nbytes
        counts.seconds_waiting += self.ssp.take_seconds()
        if exchange.number is not None:
            counts.commits += 1
            counts.staleness[exchange.staleness] += 1
        counts.refused_commits += exchange.refused
        if exchange.refused and counts.refused_commits == 1:
            exit_protocol.say(
                f"rank {self._rank}: a commit held an infinity or a NaN and was refused; this worker goes on from the "
                "center. If it happens again and again, the local optimizer's state (momentum) may hold it too"
            )

    def took_over(self, others: int, *, window_begins: bool) -> None:
        """Notes that the local parameters come from a center with so many commits of other workers.

        Args:
            others: see `Seen`.
            window_begins: whether no gradient was taken since the last commit.
        """
        seen = self.seen._replace(others=others)
        self.seen = seen.window_begun() if window_begins else seen


class Exchange(Generic[Contribution]):
    """One exchange; afterwards its attributes say what it came to.

    Args:
        client: of this worker.
        seen: the commits that this worker knows of before it.
        contribution: what the rule made of the local steps, for the rule's own use.
        out: receives the center; None: nothing is pulled.
        bounded: whether `max_clock_spread` holds for this exchange.

    Attributes:
        contribution: as given.
        number: the commit's, counted over all workers from 0; None: nothing was committed.
        staleness: commits of other workers that the commit does not know of; 0 without a commit.
        fresh: whether no other worker has begun a commit since this worker's pull; known once `begin` has returned.
        clock: of the center that was pulled: the commits that are known to be in it.
        center: as it was pulled; None: it was not.
        seen: the commits that this worker knows of, now.
        refused: whether the commit, or a part of it, held an infinity or a NaN and was left out.
        stopping: whether a worker has asked all to stop.
        nbytes: committed and pulled.
    """

    def __init__(
        self, client: Client, seen: Seen, contribution: Contribution, out: Flat | None, *, bounded: bool = True
    ) -> None:
        self._client, self._out, self._bounded = client, out, bounded
        self.contribution, self.seen = contribution, seen
        self.number: int | None = None
        self.staleness = self.clock = self.nbytes = 0
        self.fresh = self.refused = self.stopping = False
        self.center: Flat | None = None

    @property
    def pulls(self) -> bool:
        """Whether the center is pulled in this exchange."""
        return self._out is not None

    def run(self, commit: Callable[[Exchange[Any]], None] | None) -> None:
        """Makes the exchange; any thread may, while no other uses this worker's center.

        Args:
            commit: the rule's; commits by the methods below, and may pull. None: nothing is committed.
        """
        with self._client.ordered():
            self._client.pass_stop_request_on()
            if commit is None:
                self._pull_if_asked()
            else:
                with self._client.ssp.exchange(self._bounded) as let_the_slowest_commit:
                    commit(self)
                    let_the_slowest_commit()
                    self._pull_if_asked()
            self.stopping = self._client.center.clock.stop_requested()

    def _pull_if_asked(self) -> None:
        if self._out is not None and self.center is None:
            self.pull()

    # What a rule calls in its commit.

    def begin(self) -> int:
        """Takes the commit's number and returns its staleness; no commit of another worker can get the same number."""
        self._begun(self._client.center.clock.begin())
        return self.staleness

    def commit(self, delta: Flat, short: Few | None = None) -> None:
        """Adds `delta` to the center; arguments as `Center.commit`."""
        if self.number is None:
            self.begin()
        self._client.center.commit(delta, short, self.number)
        self._committed(delta)

    def pull(self) -> Flat:
        """Pulls the center and returns it."""
        assert self._out is not None
        self._pulled(self._client.center.pull(self._out))
        return self._out

    def commit_and_pull(self, delta: Flat, *, scale: float = 1.0, short: Few | None = None) -> None:
        """Adds `delta * scale` and pulls, in one pass over the center; `begin` was called. See `Center`.

        Where a bound on clocks makes this worker wait between its commit and its pull, they are two passes.
        """
        assert self._out is not None
        if self._bounded and self._client.ssp.bounded:
            self.commit(delta if scale == 1.0 else delta * delta.dtype.type(scale), short)
            return
        center, number = self._client.center, self.number
        _, clock = center.commit_and_pull(delta, self._out, scale=scale, short=short, number=number)
        self._committed(delta)
        self._pulled(clock)

    def add_to_sums(self, values: Flat) -> Flat:
        """Adds to the sums that lie with the center and returns what they were before; see `Center.add_to_sums`."""
        self.nbytes += values.nbytes
        return self._client.center.add_to_sums(values)

    def change_shards(self, change: Callable[[slice, Flat], Flat]) -> None:
        """Reads, changes and writes back each shard of the center under its lock; see `Center.exchange`."""
        assert self._out is not None
        number, clock = self._client.center.exchange(change, self._out)
        self._begun(number)
        self._committed(self._out)
        self._pulled(clock)

    def refuse(self) -> None:
        """Notes that what was to be committed holds an infinity or a NaN and stays out of the center."""
        self.refused = True

    def _begun(self, number: int) -> None:
        self.number = number
        self.staleness, self.fresh = self.seen.staleness(number), self.seen.fresh(number)

    def _committed(self, delta: Flat) -> None:
        self.seen = self.seen.committed()
        self.nbytes += delta.nbytes

    def _pulled(self, clock: int) -> None:
        assert self._out is not None
        self.clock, self.center, self.seen = clock, self._out, self.seen.pulled(clock)
        self.nbytes += self._out.nbytes
