"""Exchanges that overlap with local steps (`overlap`): what they do to the last bit, how stale they are, what they
hide, what they refuse.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from family_helpers import ELEMENTS, KINDS, OVERLAPPED, Bowl, Slope, center_of, everyone, one_step, sgd, weight
from training_helpers import batch, loss_of, mlp

import mpidl
from mpidl.errors import ArgumentError, ClosedError
from mpidl.optim import flat
from mpidl.parameter_server.center.center import Center

WITH_OTHERS = True
SIZES = (1, 4, (2, 1))
START = np.linspace(-1, 2, 7)


def landed(optimizer):
    """Waits for the thread; what it has pulled is not taken over yet."""
    if optimizer._overlap._under_way is not None:
        future, _ = optimizer._overlap._under_way
        future.wait(lambda: None)


def in_turns(comm, model, optimizer, steps):
    """As `family_helpers.in_turns`, but for exchanges that a thread makes: they end within their worker's turn."""
    for _ in range(steps):
        for turn in range(comm.size):
            if turn == comm.rank:
                one_step(model, optimizer)
                landed(optimizer)
            comm.barrier()


@pytest.mark.whole_product  # only one size does anything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("window", "overlap"), [(1, 1), (3, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("name", ["Downpour", "DynSGD"])
def test_one_worker_is_plain_sgd_bit_for_bit(comm, name, window, overlap, dtype):
    if comm.size != 1:
        return
    ours, plain = mlp(dtype), mlp(dtype)
    inner = sgd(ours, momentum=0.9)
    optimizer = KINDS[name](inner, ours, communication_window=window, overlap=overlap, comm=comm)
    expected = sgd(plain, momentum=0.9)
    for step in range(12):
        for model, stepped in ((ours, optimizer), (plain, expected)):
            stepped.zero_grad()
            loss_of(model, batch(0, step, dtype=dtype)).backward()
            stepped.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    optimizer.finish()
    assert optimizer.statistics.staleness == {0: -(-12 // window)}
    if dtype != torch.bfloat16:  # a sum of rounded steps is not rounded itself
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(("window", "overlap"), [(1, 1), (2, 1), (3, 3)])
@pytest.mark.parametrize("name", ["Downpour", "AGN", "DynSGD"])
def test_the_rule_is_what_it_says(comm, name, window, overlap):
    """All workers in numpy, in turns: theta moves by P - theta_c, `overlap` steps after the exchange that pulled P."""
    rate, steps, n = 0.1, 3 * window + 1, comm.size
    target = np.arange(7) * 0.25 - comm.rank
    model = Bowl(START, target)
    optimizer = KINDS[name](sgd(model, rate), model, communication_window=window, overlap=overlap, comm=comm)
    in_turns(comm, model, optimizer, steps)
    center, commits = START.copy(), 0
    theta = [START.copy() for _ in range(n)]
    start, late, base, clock = list(theta), [None] * n, [0] * n, [0] * n
    for step in range(1, steps + 1):
        for k in range(n):
            theta[k] = theta[k] - rate * (theta[k] - (np.arange(7) * 0.25 - k))
            if late[k] is not None and (step - 1) % window + 1 == overlap:
                begun, pulled, now = late[k]
                theta[k], start[k], clock[k], late[k] = theta[k] + (pulled - begun), pulled, now, None
            if step % window == 0:
                staleness = commits - base[k]
                delta = theta[k] - start[k]
                scale = {"Downpour": 1, "AGN": 1 / window, "DynSGD": 1 / (staleness + 1)}[name]
                center, commits = center + delta * scale, commits + 1
                late[k], base[k] = (theta[k], center, commits), clock[k] + 1
    np.testing.assert_allclose(weight(model), theta[comm.rank], rtol=1e-12, atol=1e-14)
    comm.barrier()
    clock, found = optimizer.snapshot()
    assert clock == commits
    np.testing.assert_allclose(found, center, rtol=1e-12, atol=1e-14)
    comm.barrier()
    optimizer.finish()


@pytest.mark.parametrize(("overlap", "rounds"), [(0, 1), (1, 2)])
def test_in_turns_commits_are_stale_by_one_round_more(comm, overlap, rounds):
    """Gradients were taken before the others' last round was known: 2 (n - 1) commits that they miss, for n - 1."""
    n, model = comm.size, Slope(comm.rank)
    optimizer = mpidl.Downpour(sgd(model, 1e-3), model, communication_window=1, overlap=overlap, comm=comm)
    in_turns(comm, model, optimizer, 7)
    optimizer.snapshot()  # counts what is under way
    settled = {tau: count for tau, count in optimizer.statistics.staleness.items() if tau == rounds * (n - 1)}
    assert sum(settled.values()) >= 7 - rounds
    assert max(optimizer.statistics.staleness) == rounds * (n - 1)
    comm.barrier()
    optimizer.finish()


@pytest.mark.parametrize(("n_push", "n_fetch", "overlap"), [(1, 1, 1), (2, 5, 3), (3, 2, 2)])
def test_pushes_and_fetches_of_distbelief_by_a_thread(comm, n_push, n_fetch, overlap):
    """Staleness of every push, and when parameters become what was fetched: all workers counted, in turns."""
    n, steps, model = comm.size, 12, Slope(comm.rank)
    given = {"n_push": n_push, "n_fetch": n_fetch, "overlap": overlap, "gamma": 0.5}
    optimizer = mpidl.DistBelief(sgd(model, 0.25), model, comm=comm, **given)
    seen = [weight(model)]
    for _ in range(steps):
        in_turns(comm, model, optimizer, 1)
        seen.append(weight(model))
    optimizer.snapshot()
    others = [[0] * n for _ in range(2)]  # their commits that parameters know of, and the oldest gradient
    late, pushed, found = [None] * n, [0] * n, []
    for step in range(1, steps + 1):
        for k in range(n):
            if (step - 1) % n_push == 0:
                others[1][k] = others[0][k]
            since = (step - 1) % n_fetch + 1
            if late[k] is not None and since == overlap:
                others[0][k], late[k] = late[k], None
            if step % n_push == 0:
                if k == comm.rank:
                    found.append(sum(pushed) - pushed[k] - others[1][k])
                pushed[k] += 1
            if step % n_fetch == 0:
                late[k] = sum(pushed) - pushed[k]
    assert sorted(optimizer.statistics.staleness.elements()) == sorted(found)
    own = -0.25 * np.arange(ELEMENTS) * (comm.rank + 1)
    for step in range(1, steps + 1):
        local = np.array_equal(seen[step], seen[step - 1] + own)
        taken_over = step > n_fetch and (step - 1) % n_fetch + 1 == overlap
        assert local != taken_over
    comm.barrier()
    optimizer.finish()


@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("name", ["Downpour overlapped", "DynSGD overlapped", "DistBelief overlapped"])
def test_no_commit_is_lost_or_doubled(comm, name):
    """Whole numbers, as fast as all can: the center is the sum of all commits, and each has a number of its own."""
    model, steps = Slope(comm.rank), 40
    lr, window = 1.0, {"communication_window": 2}
    numbers, applied = [], []
    optimizer = OVERLAPPED[name](sgd(model, lr), model, comm=comm, **window)
    begin = optimizer._center.clock.begin

    def counted():
        numbers.append(begin())
        return numbers[-1]

    optimizer._center.clock.begin = counted
    if name == "DynSGD overlapped":
        scale = optimizer._scale
        optimizer._scale = lambda staleness: applied.append(scale(staleness)) or applied[-1]
    for _ in range(steps):
        one_step(model, optimizer)
    optimizer.finish()
    every = np.sort(everyone(comm, np.array(numbers)).ravel())
    assert np.array_equal(every, np.arange(comm.size * steps // 2))
    assert optimizer.statistics.commits == steps // 2
    ranks = np.arange(1, comm.size + 1)
    if name == "Downpour overlapped":
        assert np.array_equal(weight(model), -np.arange(ELEMENTS) * float(steps * ranks.sum()))
    if name == "DynSGD overlapped":
        sums = everyone(comm, np.array([sum(applied)])).ravel()
        np.testing.assert_allclose(weight(model), -2.0 * np.arange(ELEMENTS) * (sums @ ranks), rtol=1e-12)
    if name == "DistBelief overlapped":
        assert np.array_equal(optimizer.sums(), np.arange(ELEMENTS) ** 2.0 * (ranks**2).sum() * 4 * (steps // 2))


def test_time_is_hidden_and_counted_only_where_it_is_not(comm, monkeypatch):
    """An exchange that takes 100 ms, a step that takes 200: together 200, of which the worker waits for none."""
    slow = Center.commit_and_pull

    def slower(*args, **given):
        time.sleep(0.1)
        return slow(*args, **given)

    monkeypatch.setattr(Center, "commit_and_pull", slower)
    spent, waited = [], []
    for overlap in (0, 1):
        model = Slope(comm.rank)
        optimizer = mpidl.Downpour(sgd(model, 1e-3), model, communication_window=1, overlap=overlap, comm=comm)
        comm.barrier()
        started = time.perf_counter()
        for _ in range(5):
            time.sleep(0.2)
            one_step(model, optimizer)
        spent.append(time.perf_counter() - started)
        waited.append(optimizer.statistics.seconds_communicating)
        optimizer.finish()
    assert spent[0] >= 5 * 0.3
    assert spent[1] < 0.85 * spent[0], spent
    assert waited[0] >= 5 * 0.1 and waited[1] < 0.4 * waited[0], waited


@pytest.mark.parametrize("name", OVERLAPPED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_commit_that_is_not_finite_is_refused_and_counted(comm, name, bad):
    model = Slope(comm.rank)
    optimizer = OVERLAPPED[name](sgd(model, 0.1), model, communication_window=1, comm=comm)
    model().backward()
    if comm.rank == 0:
        model.weight.grad[7] = bad
    optimizer.step()
    optimizer.snapshot()
    assert optimizer.statistics.refused_commits == (comm.rank == 0)
    for _ in range(2):
        one_step(model, optimizer)
    optimizer.finish()
    assert optimizer.statistics.refused_commits == (comm.rank == 0)
    assert optimizer.statistics.commits == 3 - (comm.rank == 0)
    assert torch.isfinite(model.weight).all() and (model.weight[1:3] < 0).all()


@pytest.mark.parametrize("name", OVERLAPPED)
def test_narrow_and_mixed_dtypes(comm, name):
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3).bfloat16(), torch.nn.Conv2d(4, 2, 1))
    model = model.to(memory_format=torch.channels_last)
    optimizer = OVERLAPPED[name](sgd(model, 0.01), model, communication_window=2, comm=comm)
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 5, 5).mul(1 + comm.rank).bfloat16().to(memory_format=torch.channels_last)
        model[1](model[0](x).float()).square().mean().backward()
        optimizer.step()
    comm.barrier()
    optimizer._settle()
    rounded = optimizer._start.copy()
    flat.round_like(optimizer._layout, optimizer._views(), rounded)
    assert np.array_equal(rounded, optimizer._start)  # or rounding would be committed as if it were a step
    optimizer.finish()
    weights = everyone(comm, torch.cat([p.detach().float().flatten() for p in model.parameters()]).numpy())
    assert np.isfinite(weights).all() and (weights == weights[0]).all()


def test_what_the_thread_meets_reaches_who_waits_for_it(comm, monkeypatch):
    model = Slope(comm.rank)
    optimizer = mpidl.Downpour(sgd(model, 1e-3), model, communication_window=1, overlap=1, comm=comm)
    with monkeypatch.context() as patched:

        def fails(*_, **__):
            raise mpidl.RankFailedError("planted reason")

        patched.setattr(Center, "commit_and_pull", fails)
        one_step(model, optimizer)  # begins it
        with pytest.raises(mpidl.RankFailedError, match="planted reason"):
            one_step(model, optimizer)
    comm.barrier()
    optimizer.finish()


class Cut(torch.nn.Module):
    """A parameter that lies in memory with gaps."""

    def __init__(self, whole):
        super().__init__()
        self.weight = torch.nn.Parameter(whole[:, :5])

    def forward(self):
        return (self.weight - 1).square().sum() / 2


def test_parameters_with_gaps_move_as_others_do(comm):
    found = []
    for make in (torch.clone, lambda whole: whole):
        model = Cut(torch.zeros(4, 9))
        model.weight.data = make(model.weight.data)
        optimizer = mpidl.Downpour(sgd(model, 0.1), model, communication_window=1, overlap=1, comm=comm)
        in_turns(comm, model, optimizer, 5)
        found.append(weight(model))
        comm.barrier()
        optimizer.finish()
    assert np.array_equal(*found)


@pytest.mark.parametrize("ends_meanwhile", [False, True])
def test_a_wait_that_is_broken_off_commits_nothing_twice(comm, monkeypatch, ends_meanwhile):
    """Ctrl-C while the thread is at it: its window has been committed all the same when it ends."""
    model, slow = Slope(comm.rank), Center.commit_and_pull

    def slower(*args, **given):
        time.sleep(0.3)
        return slow(*args, **given)

    def interrupted():
        if ends_meanwhile:
            landed(optimizer)
        raise KeyboardInterrupt

    optimizer = mpidl.Downpour(sgd(model, 1.0), model, communication_window=1, overlap=1, comm=comm)
    with monkeypatch.context() as patched:
        patched.setattr(Center, "commit_and_pull", slower)
        one_step(model, optimizer)
        patched.setattr(optimizer._center, "look", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one_step(model, optimizer)
    one_step(model, optimizer)  # it exchanges again
    assert optimizer.exchanged
    optimizer.finish()
    steps = 3.0 * comm.size * (comm.size + 1) / 2
    assert np.array_equal(weight(model), -np.arange(ELEMENTS) * steps)
    assert optimizer.statistics.commits == 2
    with pytest.raises(ClosedError, match="its thread has ended"):
        optimizer._overlap._executor.start(lambda: None)


@pytest.mark.parametrize("name", OVERLAPPED)
def test_a_wish_to_stop_reaches_a_worker_whose_commits_are_refused(comm, name):
    model = Slope(comm.rank)
    optimizer = OVERLAPPED[name](sgd(model, 1.0), model, communication_window=2, comm=comm)
    deadline = time.monotonic() + 30
    while not optimizer.stopping and time.monotonic() < deadline:
        if comm.rank == comm.size - 1 and optimizer.statistics.steps == 6:
            optimizer.request_stop()
        optimizer.zero_grad()
        model().backward()
        if comm.rank == comm.size - 1:
            model.weight.grad[3] = float("nan")
        optimizer.step()
        time.sleep(0.001)
    assert optimizer.stopping
    optimizer.finish()
    assert optimizer.statistics.commits == 0 or comm.rank < comm.size - 1


def test_reading_the_center_ends_what_is_under_way(comm):
    model = Slope(comm.rank)
    optimizer = mpidl.Downpour(sgd(model, 1.0), model, communication_window=2, overlap=2, comm=comm)
    for _ in range(2):
        one_step(model, optimizer)
    comm.barrier()
    before = weight(model)
    clock, center = optimizer.center()
    assert optimizer.statistics.commits == 1
    comm.barrier()
    assert 1 <= clock <= comm.size
    together = -np.arange(ELEMENTS) * float(comm.size * (comm.size + 1))
    assert np.array_equal(center_of(optimizer), together)
    assert set(center) == {"weight"}
    assert np.array_equal(weight(model), before)  # who reads changes nothing
    comm.barrier()
    optimizer.finish()


def test_what_cannot_be_is_refused_alike(comm):
    model = Slope(comm.rank)
    for given, says in (
        ({"overlap": 3, "communication_window": 2}, "expected at most communication_window, which is 2"),
        ({"overlap": 1, "max_clock_spread": 1}, "leave one"),
        ({"overlap": -1}, "overlap=-1; expected a whole number, 0 or more"),
        ({"overlap": True}, "overlap=True; expected a whole number"),
    ):
        with pytest.raises(ArgumentError, match=says):
            mpidl.Downpour(sgd(model), model, comm=comm, **given)
    with pytest.raises(ArgumentError, match="expected at most n_fetch, which is 2"):
        mpidl.DistBelief(sgd(model), model, n_fetch=2, overlap=3, comm=comm)
