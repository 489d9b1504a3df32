"""The family under contention, the bound of SSP, warm starts."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from family_helpers import ELEMENTS, KINDS, Bowl, Slope, center_of, everyone, one_step, sgd, weight

import mpidl
from mpidl.parameter_server.center import clock as clocks
from mpidl.parameter_server.center.center import Center, Requirements

WITH_OTHERS = True
SERVERS = (0, 1)
SWAPS = 25


# ------------------------------------------------------------------------------------------------------- contention


@pytest.mark.usefixtures("protocol")
def test_exchanges_lose_and_tear_nothing(world_comm):
    """Every worker swaps a vector of its own, all of one number, with the center, again and again, all at once.

    Whoever reads a shard that another is writing, or writes what another has meanwhile replaced, leaves numbers that
    were lost, doubled, or mixed within a shard.
    """
    comm = world_comm
    ranks = comm.topology.duplicate("test of the exchange")
    server = Center(ranks, np.zeros(ELEMENTS), "test", comm.dedicated_servers, Requirements(locks=True))
    mine, out, numbers = np.full(ELEMENTS, comm.rank + 1.0), np.empty(ELEMENTS), []
    clock = 0
    for _ in range(SWAPS):
        seen = np.empty(ELEMENTS)

        def swap(here, center, seen=seen, mine=mine):
            seen[here] = center
            return mine[here].copy()

        number, now = server.exchange(swap, out)
        assert number >= clock and now > clock
        assert np.array_equal(out, mine)
        numbers.append(number)
        mine, clock = seen, now
        for part in server._order:
            assert np.unique(mine[part.start : part.start + part.count]).size <= 1
    ranks.barrier("all have swapped")
    assert server.pull(out) == SWAPS * comm.size
    held = np.sort(np.vstack([everyone(comm, mine), out]), axis=0)
    assert np.array_equal(held, np.arange(comm.size + 1.0)[:, None].repeat(ELEMENTS, 1))
    assert np.array_equal(np.sort(everyone(comm, np.array(numbers)).ravel()), np.arange(SWAPS * comm.size))
    server.close()
    ranks.free()


def test_a_lock_is_given_in_the_order_in_which_it_was_asked_for(world_comm):
    """Fair service: rank 0 holds it until all others have asked, the last rank first; none may overtake another."""
    comm = world_comm
    ranks = comm.topology.duplicate("test of the locks")
    server = Center(ranks, np.zeros(1), "test", comm.dedicated_servers, Requirements(locks=True))
    (part,) = (part for part in server._order if part.count)
    tickets, out, asked = server._locks._window, np.empty(1), 0
    mine = (comm.size - comm.rank) % comm.size  # 0, then the last rank, ...
    while asked != mine:
        asked = tickets.fetch_add(part.owner, 0, 0)

    def count(_, center):
        while comm.rank == 0 and tickets.fetch_add(part.owner, 0, 0) < comm.size:
            time.sleep(0.001)
        return center + 1

    server.exchange(count, out)
    assert out[0] == mine + 1
    server.close()
    ranks.free()


@pytest.mark.usefixtures("protocol")
def test_sums_of_squares_count_every_push_in_one_order(world_comm):
    """Integers: sums are exact, and what each push found before itself are the partial sums of one order."""
    comm = world_comm
    ranks = comm.topology.duplicate("test of the sums")
    server = Center(ranks, np.zeros(ELEMENTS), "test", comm.dedicated_servers, Requirements(sums=True))
    found = [server.add_to_sums(np.full(ELEMENTS, 1.0 + comm.rank)) for _ in range(60)]
    ranks.barrier("all have pushed")
    total = 60 * comm.size * (comm.size + 1) / 2
    assert (server.sums() == total).all()
    pieces = everyone(comm, np.array(found)).reshape(-1, ELEMENTS)
    after = pieces + np.repeat(np.arange(1.0, comm.size + 1), 60)[:, None]
    before, after = np.sort(pieces, axis=0), np.sort(after, axis=0)
    assert (before[0] == 0).all() and np.array_equal(before[1:], after[:-1])
    server.close()
    ranks.free()


@pytest.mark.usefixtures("protocol")
def test_dynsgd_scales_by_a_staleness_that_no_other_commit_shares(world_comm, monkeypatch):
    """All commit at once from the same center: numbers tell them apart, and only one of them has staleness 0."""
    comm, rounds, log = world_comm, 40, []
    commit = Center.commit_and_pull

    def logged(server, delta, out, *, scale, short, number):
        seen = optimizer._client.seen
        log.append((number, seen.own + seen.others, delta[1] * scale))
        return commit(server, delta, out, scale=scale, short=short, number=number)

    monkeypatch.setattr(Center, "commit_and_pull", logged)
    model = Slope(0)
    optimizer = mpidl.DynSGD(sgd(model, 1.0), model, communication_window=1, comm=comm)
    for _ in range(rounds):
        comm.barrier()
        one_step(model, optimizer)
    comm.barrier()
    every = everyone(comm, np.array(log)).reshape(-1, 3)
    assert np.array_equal(np.sort(every[:, 0]), np.arange(rounds * comm.size))
    np.testing.assert_allclose(every[:, 2], -1 / (every[:, 0] - every[:, 1] + 1), rtol=1e-9)
    np.testing.assert_allclose(center_of(optimizer)[1], every[:, 2].sum(), rtol=1e-9)
    comm.barrier()
    optimizer.finish()


# -------------------------------------------------------------------------------------------------------------- SSP


@pytest.mark.parametrize("name", ["Downpour", "AEASGD", "GEM", "DistBelief"])
@pytest.mark.parametrize("spread", [0, 2])
def test_no_worker_is_more_than_the_spread_ahead(world_comm, name, spread):
    """The last rank takes no step until the others can go no further: one commit more than the spread, and they wait.

    Whenever a worker may go on, the slowest is at most `spread` exchanges behind.
    """
    comm, leads = world_comm, []
    slow = comm.rank == comm.size - 1
    model = Slope(comm.rank)
    optimizer = KINDS[name](sgd(model, 1e-3), model, communication_window=1, max_clock_spread=spread, comm=comm)
    clock = optimizer._center.clock
    if slow:
        others = [0]
        while min(others) < spread + 1:
            time.sleep(0.001)
            others = committed(clock)[:-1]
        time.sleep(0.02)
        assert (committed(clock)[:-1] == spread + 1).all()
    for _ in range(8):
        one_step(model, optimizer)
        leads.append(optimizer.statistics.commits - clock.fewest_committed())
    assert max(leads) <= spread
    optimizer.finish()
    assert slow or optimizer.statistics.seconds_waiting > 0.01
    assert optimizer.statistics.seconds_waiting <= optimizer.statistics.seconds_communicating


def committed(clock):
    """Everybody's exchanges."""
    counts = np.empty(clock._workers, np.int64)
    clock._window.read(clock._home, clocks._COUNTERS, counts)
    clock._window.flush()
    return counts


def test_a_spread_of_0_is_bulk_synchronous(world_comm):
    """Rounds on the same center, dyadic numbers: the result is that of serial rounds, bit for bit.

    The last rank dawdles before it pulls, so that the others could commit to the next round already.
    """
    comm, rounds, lr = world_comm, 6, 1 / 8
    model = Bowl(np.zeros(7), np.arange(7.0) * (comm.rank + 1))
    optimizer = mpidl.Downpour(sgd(model, lr), model, communication_window=1, max_clock_spread=0, comm=comm)
    pull = optimizer._center.pull

    def dawdling(out):
        time.sleep(0.02 if comm.rank == comm.size - 1 else 0)
        return pull(out)

    optimizer._center.pull = dawdling
    for _ in range(rounds):
        one_step(model, optimizer)
    optimizer.finish()
    center = np.zeros(7)
    for _ in range(rounds):
        center = center - lr * sum(center - np.arange(7.0) * (rank + 1) for rank in range(comm.size))
    assert np.array_equal(weight(model), center)


def test_without_a_spread_nobody_waits_and_nothing_is_counted(world_comm):
    comm = world_comm
    model = Slope(comm.rank)
    optimizer = mpidl.Downpour(sgd(model), model, communication_window=1, comm=comm)
    if comm.rank:  # rank 0 takes no step until the others have taken all of theirs
        for _ in range(20):
            one_step(model, optimizer)
    comm.barrier()
    assert optimizer.statistics.seconds_waiting == 0
    assert (committed(optimizer._center.clock) == 0).all()
    comm.barrier()
    optimizer.finish()


def test_who_has_finished_is_not_waited_for(world_comm):
    """Workers take different numbers of steps, with tails; the fast ones go on when the others have left."""
    comm = world_comm
    model = Slope(comm.rank)
    optimizer = mpidl.AGN(sgd(model), model, communication_window=2, max_clock_spread=1, comm=comm)
    for _ in range(3 + 4 * comm.rank):
        one_step(model, optimizer)
    optimizer.finish()
    assert optimizer.statistics.commits == math.ceil((3 + 4 * comm.rank) / 2)


# ------------------------------------------------------------------------------------------------------- warm start


@pytest.mark.parametrize("spread", [None, 1])
def test_in_a_warm_start_rank_0_trains_alone(world_comm, spread):
    comm = world_comm
    model = Slope(comm.rank)
    optimizer = mpidl.DistBelief(sgd(model), model, gamma=0.5, warm_start=5, max_clock_spread=spread, comm=comm)
    if comm.rank == 0:
        time.sleep(0.05)
    first = None
    for _ in range(7):
        optimizer.zero_grad()
        loss = model()
        first = weight(model) if first is None else first
        loss.backward()
        optimizer.step()
    alone = -0.5 * (1 / np.sqrt(np.arange(1, 6))).sum()  # five steps with the same gradient
    if comm.rank:
        assert first[1] <= alone + 1e-9
    optimizer.finish()
    assert comm.rank or first[1] == 0
    assert not model._forward_pre_hooks


def test_a_leader_that_ends_early_lets_the_others_begin(world_comm):
    comm = world_comm
    model = Slope(comm.rank)
    with mpidl.DistBelief(sgd(model), model, warm_start=100, comm=comm) as optimizer:
        for _ in range(2 if comm.rank == 0 else 4):
            one_step(model, optimizer)
    assert optimizer.statistics.commits == (2 if comm.rank == 0 else 4)
