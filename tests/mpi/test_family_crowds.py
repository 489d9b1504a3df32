"""Crowds of workers, in one rank: many optimisers share one center and go in any order, so that laws can be held to.

Each worker is a real optimiser; only the server of all but the first is taken away. What needs ranks is elsewhere.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from family_helpers import Bowl, center_of, one_step, sgd

import mpidl
from mpidl.parameter_server.center.center import Center

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1,)


class Crowd:
    """`n` workers on one center."""

    def __init__(self, comm, kind, n, lr, window):
        self.window = window
        self.workers = []
        for _ in range(n):
            model = Bowl(np.ones(1))
            self.workers.append((model, kind(sgd(model, lr), model, communication_window=window, comm=comm)))
        self.servers = [optimizer._center for _, optimizer in self.workers]
        for _, optimizer in self.workers:
            optimizer._client.center = self.servers[0]

    def go(self, turn):
        """Has one worker take a window's steps, and so exchange."""
        for _ in range(self.window):
            one_step(*self.workers[turn])

    def center(self):
        return float(center_of(self.workers[0][1])[0])

    def begin_again(self):
        """Puts all of them at 1, where they began."""
        server = self.servers[0]
        server.commit(1.0 - center_of(self.workers[0][1]))
        for _, optimizer in self.workers:
            optimizer._pull()

    def close(self):
        for (_, optimizer), server in zip(self.workers, self.servers, strict=True):
            optimizer._client.center = server
            optimizer.finish()


@contextmanager
def crowd(comm, kind, n, lr=1.0, window=1):
    made = Crowd(comm, kind, n, lr, window)
    yield made
    made.close()


@pytest.mark.parametrize(("window", "stable"), [(5, False), (12, True)])
def test_agn_of_sixteen_workers_needs_a_window_of_two_thirds_of_them(comm, window, stable):
    """One step of rate 1 is the whole way, so that a commit is x / window: stable below 2 sin(pi / 62) = 1 / 9.9."""
    with crowd(comm, mpidl.AGN, 16, window=window) as workers:
        for _ in range(60):
            for turn in range(16):
                workers.go(turn)
        assert (abs(workers.center()) < 0.2) == stable
        assert (abs(workers.center()) > 10) == (not stable)


@pytest.mark.parametrize("n", [2, 5])
def test_in_random_order_staleness_is_a_momentum_of_one_minus_one_nth(comm, n):
    """Mitliagkas et al. 2016: of many runs' mean, V' = mu V - a x, and the fit gives mu = 1 - 1/n and a = lr/n."""
    order, lr, runs, steps = np.random.default_rng(n), 0.3, 120, 12
    found = np.empty((runs, steps + 1))
    with crowd(comm, mpidl.Downpour, n, lr) as workers:
        for run in range(runs):
            workers.begin_again()
            found[run, 0] = workers.center()
            for step in range(steps):
                workers.go(order.integers(n))
                found[run, step + 1] = workers.center()
    mean = found.mean(axis=0)
    moves = np.diff(mean)
    (mu, rate), *_ = np.linalg.lstsq(np.stack([moves[:-1], mean[1:-1]], axis=1), moves[1:])
    assert mu == pytest.approx(1 - 1 / n, abs=0.15)
    assert rate == pytest.approx(-lr / n, abs=0.06)


@pytest.mark.parametrize("n", [2, 4, 16, 32])
def test_in_turns_staleness_is_exactly_n_minus_1_after_the_first_round(comm, n):
    with crowd(comm, mpidl.Downpour, n, lr=0.01) as workers:
        for _ in range(3):
            for turn in range(n):
                workers.go(turn)
        for turn, (_, optimizer) in enumerate(workers.workers):
            assert optimizer.statistics.staleness == Counter({turn: 1}) + Counter({n - 1: 2})


@pytest.mark.parametrize("n", [8, 32])
def test_in_any_order_staleness_is_n_minus_1_on_average(comm, n):
    """Every commit is missed once by each other worker: the sum over all of them is known, their spread is not."""
    order, rounds = np.random.default_rng(n), 20
    with crowd(comm, mpidl.Downpour, n, lr=0.01) as workers:
        for turn in [*range(n), *order.integers(n, size=rounds * n), *range(n)]:
            workers.go(turn)
        staleness = sum((optimizer.statistics.staleness for _, optimizer in workers.workers), Counter())
    total = rounds * n + 2 * n
    missed = sum(tau * times for tau, times in staleness.items())
    assert missed == total * (n - 1) - n * (n - 1) // 2  # what came after a worker's last commit was never missed
    assert max(staleness) > n - 1


def test_a_straggler_is_stale_for_all_and_the_mean_stays(comm):
    """Of 8 workers one is ten times slower: it misses ten rounds of the others, who miss one of its commits in ten."""
    n, times = 8, 10
    with crowd(comm, mpidl.Downpour, n, lr=0.001) as workers:
        for _ in range(4):
            for _ in range(times):
                for turn in range(1, n):
                    workers.go(turn)
            workers.go(0)
        slow, *others = (optimizer.statistics for _, optimizer in workers.workers)
        commits = sum(one.commits for one in (slow, *others))
        missed = sum(tau * count for one in (slow, *others) for tau, count in one.staleness.items())
    assert slow.staleness == Counter({times * (n - 1): 4})
    assert all(max(one.staleness) == n - 1 and one.mean_staleness < n - 1.8 for one in others)
    assert missed / commits == pytest.approx(n - 1, abs=0.1)


@pytest.mark.parametrize(("dtype", "kept"), [("float32", False), ("float64", True)])
def test_commits_below_half_an_ulp_are_lost_in_float32_and_kept_in_float64(comm, dtype, kept):
    """The center is float64 where a parameter is: what a crowd of small commits needs, late in training."""
    ranks = comm.topology.duplicate("ranks of a sum")
    server = Center(ranks, np.ones(4, dtype), "small commits")
    for _ in range(1000):
        server.commit(np.full(4, 5e-8, dtype))
    pulled = np.empty(4, dtype)
    assert server.pull(pulled) == 1000
    np.testing.assert_allclose(pulled - 1, 5e-5 if kept else 0, rtol=1e-6)
    server.close()
    ranks.free()


def test_a_model_without_elements_trains_to_nothing(comm):
    model = Bowl(np.zeros(0))
    optimizer = mpidl.Downpour(sgd(model), model, communication_window=1, comm=comm)
    one_step(model, optimizer)
    optimizer.finish()
    assert (optimizer.statistics.commits, optimizer.snapshot()[0]) == (1, 1)
