"""The asynchronous family: each rule to the last bit, or against its formulas in numpy, workers going in turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_helpers import (
    ELEMENTS,
    KINDS,
    OVERLAPPED,
    Bowl,
    Slope,
    center_of,
    everyone,
    in_turns,
    one_step,
    sgd,
    weight,
)
from training_helpers import assert_alike, batch, loss_of, mlp

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3, (2, 1))
START = np.linspace(-1, 2, 7)


def close_to(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def target(rank):
    return np.arange(7) * 0.25 - rank


def by_turns(comm, kind, steps, lr=0.1, momentum=0.0, **given):
    """Trains in turns on bowls with different minima; returns center, model and the open optimizer."""
    model = Bowl(START, target(comm.rank))
    optimizer = kind(sgd(model, lr, momentum=momentum), model, comm=comm, **given)
    in_turns(comm, model, optimizer, steps)
    center = center_of(optimizer)
    comm.barrier()  # all have read it: who finishes may commit a tail
    return center, model, optimizer


# ------------------------------------------------------------------------------------------------ one worker is plain


@pytest.mark.whole_product  # only one size does anything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "window", "momentum"),
    [("DynSGD", 1, 0.9), ("DynSGD", 5, 0), ("ADAG", 1, 0), ("ADAG", 5, 0.9), ("DCASGD", 1, 0), ("DCASGD", 3, 0)],
)
def test_one_worker_is_plain_sgd_bit_for_bit(comm, kind, window, momentum, dtype):
    if comm.size != 1:
        return
    ours, plain = mlp(dtype), mlp(dtype)
    optimizer = KINDS[kind](sgd(ours, momentum=momentum), ours, communication_window=window, comm=comm)
    expected = sgd(plain, momentum=momentum)
    for step in range(12):
        for model, stepped in ((ours, optimizer), (plain, expected)):
            stepped.zero_grad()
            loss_of(model, batch(0, step, dtype=dtype)).backward()
            stepped.step()
    optimizer.finish()
    assert optimizer.statistics.staleness == {0: -(-12 // window)}
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rules_that_become_another_one_bit_for_bit(comm):
    """Each pair runs in the same turns; the first of a pair has the option that makes it the second."""
    pairs = [
        ((mpidl.DCASGD, {"lambda_": 0.0, "communication_window": 2}), (mpidl.Downpour, {"communication_window": 2})),
        ((mpidl.ADAG, {"gamma": 1e300, "communication_window": 2}), (mpidl.Downpour, {"communication_window": 2})),
        ((mpidl.EAMSGD, {"communication_window": 2}), (mpidl.AEASGD, {"communication_window": 2})),
        ((mpidl.AGN, {"communication_window": 1}), (mpidl.Downpour, {"communication_window": 1})),
    ]
    for one, two in pairs:
        found = []
        for kind, given in (one, two):
            center, model, optimizer = by_turns(comm, kind, 6, **given)
            found.append((center, weight(model), dict(optimizer.statistics.staleness)))
            optimizer.finish()
            comm.barrier()
        assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1]), one
        assert found[0][2] == found[1][2], one


# ------------------------------------------------------------------------------------------------- against formulas


def test_dynsgd_divides_by_the_staleness_that_it_logs(comm):
    model = Slope(comm.rank)
    optimizer = mpidl.DynSGD(sgd(model, 1.0), model, communication_window=1, comm=comm)
    in_turns(comm, model, optimizer, 4)
    n, rounds = comm.size, 4
    assert sum(tau * count for tau, count in optimizer.statistics.staleness.items()) == comm.rank + 3 * (n - 1)
    taus = [[rank] + [n - 1] * (rounds - 1) for rank in range(n)]
    scale = sum((rank + 1) / (tau + 1) for rank in range(n) for tau in taus[rank])
    close_to(center_of(optimizer), -np.arange(ELEMENTS) * scale)
    optimizer.finish()


@pytest.mark.parametrize("window", [1, 3])
def test_adag_scales_by_the_distance_of_each_element(comm, window):
    gamma, lr = 0.01, 0.1
    center, _, optimizer = by_turns(comm, mpidl.ADAG, 2 * window, lr, communication_window=window, gamma=gamma)
    expected, read = START.copy(), [START.copy() for _ in range(comm.size)]
    for _ in range(2):
        for rank in range(comm.size):
            local = read[rank].copy()
            for _ in range(window):
                local -= lr * (local - target(rank))
            expected += (local - read[rank]) / ((expected - read[rank]) ** 2 / gamma + 1)
            read[rank] = expected.copy()
    if window == 1:  # a step of a longer window comes in another turn, but no exchange does
        assert optimizer.statistics.commits == 2
    close_to(center, expected)
    optimizer.finish()


def elastic(comm, steps, window, lr, delta, alpha):
    """Algorithms 1 and 2 of the EASGD paper, workers in turns: the gradient is that of x before the exchange."""
    center = START.copy()
    x, v = [START.copy() for _ in range(comm.size)], [np.zeros(7) for _ in range(comm.size)]
    for step in range(steps):
        for rank in range(comm.size):
            gradient = x[rank] + delta * v[rank] - target(rank)
            if step and step % window == 0:
                spring = alpha * (x[rank] - center)
                x[rank], center = x[rank] - spring, center + spring
            v[rank] = delta * v[rank] - lr * gradient
            x[rank] = x[rank] + v[rank]
    return center, x[comm.rank]


@pytest.mark.parametrize(("kind", "delta"), [("AEASGD", 0.0), ("EAMSGD", 0.9)])
@pytest.mark.parametrize("scale", [{}, {"beta": 0.5}, {"rho": 0.5, "learning_rate": 0.2}])
def test_elastic_averaging_is_that_of_the_paper(comm, kind, delta, scale):
    window, lr = 3, 0.05
    center, model, optimizer = by_turns(comm, KINDS[kind], 10, lr, delta, communication_window=window, **scale)
    alpha = 0.1 if "rho" in scale else scale.get("beta", 0.9) / comm.size
    assert optimizer.alpha == pytest.approx(alpha)
    expected, x = elastic(comm, 10, window, lr, delta, alpha)
    assert optimizer.statistics.commits == 3
    close_to(center, expected)
    close_to(optimizer._reached(), x)
    optimizer.finish()
    assert_alike(comm, model)


def test_an_elastic_exchange_conserves_the_sum_of_worker_and_center(comm):
    """alpha is 1/2 and all values are dyadic: not one bit may be lost, whoever exchanges when."""
    model = Bowl(np.full(7, 16.0))
    optimizer = mpidl.AEASGD(sgd(model, 1.0), model, communication_window=1, rho=0.5, learning_rate=1.0, comm=comm)
    with torch.no_grad():
        model.weight.copy_(torch.arange(7.0) * (comm.rank + 2))
    whole = 16.0 + np.arange(7) * sum(range(2, comm.size + 2))
    for _ in range(5):  # without steps: only springs move, all at once
        optimizer._steps = 1
        optimizer._exchange()
    comm.barrier()
    assert np.array_equal(everyone(comm, weight(model)).sum(0) + center_of(optimizer), whole)
    comm.barrier()
    optimizer.finish()


def corrected(comm, rounds, lr, lam, momentum, *, backups):
    """DC-ASGD in turns; `backups`: how many there are, one for each worker or, as in MXNet's code, one for all."""
    center, kept = START.copy(), [START.copy() for _ in range(backups)]
    read, v = [START.copy() for _ in range(comm.size)], [np.zeros(7) for _ in range(comm.size)]
    for _ in range(rounds):
        for rank in range(comm.size):
            g = read[rank] - target(rank)
            v[rank] = momentum * v[rank] - lr * (g + lam * g * g * (center - kept[rank % backups]))
            center = center + v[rank]
            kept[rank % backups] = read[rank] = center.copy()
    return center


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_dcasgd_corrects_by_a_backup_of_each_worker(comm, momentum):
    center, _, optimizer = by_turns(comm, mpidl.DCASGD, 4, 0.1, momentum, lambda_=0.5)
    close_to(center, corrected(comm, 4, 0.1, 0.5, momentum, backups=comm.size))
    if comm.size > 1:
        assert abs(center - corrected(comm, 4, 0.1, 0.5, momentum, backups=1)).max() > 1e-3
    optimizer.finish()


def test_gem_is_algorithm_1_with_the_clamp_of_its_code(comm):
    lr, mu, kappa = 0.1, 0.9, 1.5
    found, model, optimizer = by_turns(comm, mpidl.GEM, 6, lr, mu, kappa=kappa)
    center, clamped = START.copy(), 0
    s, m = [START.copy() for _ in range(comm.size)], [np.zeros(7) for _ in range(comm.size)]
    for _ in range(6):
        for rank in range(comm.size):
            moved = -lr * (s[rank] - target(rank))
            now = center.copy()
            m[rank] = mu * m[rank] + moved
            pi = (kappa * abs(m[rank]) - abs(now - s[rank])) / (abs(moved) + 1e-12)
            clamped += ((pi < 0) | (pi > 5)).sum()
            center = center + np.clip(pi, 0, 5) * moved
            s[rank] = now
    assert clamped or comm.size == 1
    close_to(found, center)
    close_to(weight(model), s[comm.rank])
    assert max(optimizer.statistics.staleness) <= comm.size - 1  # its own commit, which its pull missed, is none
    optimizer.finish()


def test_adagrad_moves_first_by_exactly_gamma_and_then_like_a_serial_one(comm):
    gamma, n = 0.05, comm.size
    model = Slope(comm.rank)
    optimizer = mpidl.DistBelief(sgd(model, 0.1), model, gamma=gamma, comm=comm)
    in_turns(comm, model, optimizer, 3)
    slope = np.arange(ELEMENTS, dtype=float)
    center, squares = np.zeros(ELEMENTS), np.zeros(ELEMENTS)
    for step in range(3):
        for rank in range(n):
            gradient = slope * (rank + 1)
            squares += gradient * gradient
            center += -gamma * np.divide(gradient, np.sqrt(squares), out=np.zeros(ELEMENTS), where=squares > 0)
            if step == rank == 0:
                assert (center[1:] == -gamma).all() and center[0] == 0
    assert np.array_equal(center_of(optimizer), center)
    assert np.array_equal(optimizer.sums(), squares)
    comm.barrier()
    optimizer.finish()
    assert np.array_equal(optimizer.sums(), squares)


def test_pushes_and_fetches_of_distbelief_have_periods_of_their_own(comm):
    """Between two fetches a worker steps on its own; what is pushed is the sum of the gradients, not the move."""
    model = Slope(comm.rank)
    optimizer = mpidl.DistBelief(sgd(model, 0.5, momentum=0.9), model, n_push=2, n_fetch=5, comm=comm)
    pulls, pull = [], optimizer._center.pull
    optimizer._center.pull = lambda out: (pulls.append(optimizer.statistics.steps), pull(out))[1]
    for step in range(1, 12):
        before = weight(model)
        one_step(model, optimizer)
        assert optimizer.statistics.commits == step // 2
        assert len(pulls) == step // 5
        if step % 5:
            assert weight(model)[3] < before[3]  # its own step
    optimizer.finish()
    assert optimizer.statistics.commits == 6  # the last one of a single step
    ranks = np.arange(1, comm.size + 1)
    assert np.array_equal(optimizer.sums(), np.arange(ELEMENTS) ** 2.0 * (ranks**2).sum() * (5 * 4 + 1))


# ------------------------------------------------------------------------------------------------ what all have to do


@pytest.mark.parametrize("name", KINDS | OVERLAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_committed_and_all_end_alike(comm, name, dtype):
    model = mlp(dtype)
    with (KINDS | OVERLAPPED)[name](sgd(model, 0.01), model, communication_window=3, comm=comm) as optimizer:
        for step in range(4 + comm.rank):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step, dtype=dtype)).backward()
            optimizer.step()
    assert optimizer.statistics.commits == -(-(4 + comm.rank) // 3)
    assert sum(optimizer.statistics.staleness.values()) == optimizer.statistics.commits
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_alike(comm, model)
    assert optimizer.snapshot()[0] == sum(-(-(4 + rank) // 3) for rank in range(comm.size))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", KINDS)
def test_a_commit_that_is_not_finite_is_refused_and_counted(comm, name, bad):
    model = Slope(comm.rank)
    optimizer = KINDS[name](sgd(model, 0.1), model, communication_window=1, comm=comm)
    model().backward()
    if comm.rank == 0:
        model.weight.grad[7] = bad
    optimizer.step()
    if name in ("AEASGD", "EAMSGD"):
        one_step(model, optimizer)  # the exchange comes before the next step, which is then not taken either
    assert optimizer.statistics.refused_commits == (comm.rank == 0)
    assert optimizer.statistics.commits == (comm.rank != 0)
    assert torch.isfinite(model.weight).all()
    for _ in range(2):  # it goes on from the center
        one_step(model, optimizer)
    optimizer.finish()
    assert optimizer.statistics.refused_commits == (comm.rank == 0)
    assert torch.isfinite(model.weight).all() and (model.weight[1:3] < 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_narrow_and_mixed_dtypes(comm, name):
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3).bfloat16(), torch.nn.Conv2d(4, 2, 1))
    model = model.to(memory_format=torch.channels_last)
    momentum = {} if name in ("DistBelief", "Downpour") else {"momentum": 0.5}
    optimizer = KINDS[name](sgd(model, 0.01, **momentum), model, communication_window=2, comm=comm)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 5, 5).bfloat16().to(memory_format=torch.channels_last)
        model[1](model[0](x).float()).square().mean().backward()
        optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


BAD = {
    "AEASGD": [({"beta": 0}, "beta=0; expected a number above 0"), ({"rho": 5}, "needs both"), ({"beta": 99}, "alpha")],
    "EAMSGD": [({"rho": 5.0, "learning_rate": 0.5}, "alpha = rho")],
    "ADAG": [({"gamma": -1.0}, "gamma=-1.0; expected")],
    "GEM": [({"kappa": float("nan")}, "kappa=nan"), ({"epsilon": 0}, "epsilon=0")],
    "DCASGD": [({"lambda_": -0.1}, "lambda_=-0.1")],
    "DistBelief": [({"n_push": 0}, "n_push=0"), ({"n_fetch": 1.5}, "n_fetch=1.5"), ({"warm_start": -1}, "warm_start")],
    "Downpour": [({"communication_window": 0}, "communication_window=0"), ({"max_clock_spread": -1}, "max_clock_")],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyperparameters_are_refused_on_one_rank_and_on_all(comm, name):
    for given, says in BAD[name]:
        for wrong in {comm.size - 1, None}:  # None: all
            model = mlp()
            mine = given if wrong in (None, comm.rank) else {}
            expected = mpidl.ArgumentError if mine else mpidl.MismatchError
            with pytest.raises(expected) as caught:
                KINDS[name](sgd(model), model, comm=comm, **mine)
            assert says in str(caught.value)
            assert mine or f"rank {comm.size - 1}" in str(caught.value)


def test_hyperparameters_that_differ_are_named(comm):
    if comm.size == 1:
        return
    model = mlp()
    with pytest.raises(mpidl.MismatchError, match="gamma differs between ranks"):
        mpidl.ADAG(sgd(model), model, gamma=0.1 * (1 + comm.rank), comm=comm)


@pytest.mark.parametrize("name", ["EAMSGD", "GEM", "DCASGD", "DistBelief"])
def test_rules_on_gradients_refuse_what_is_not_sgd(comm, name):
    model = mlp()
    with pytest.raises(mpidl.ArgumentError, match=rf"optimizer is a Adam; {name} works on gradients.*optim\.SGD"):
        KINDS[name](torch.optim.Adam(model.parameters()), model, comm=comm)
    if name in ("GEM", "DCASGD"):
        with pytest.raises(mpidl.ArgumentError, match=f"nesterov is True; {name} has no use for it"):
            KINDS[name](sgd(model, momentum=0.9, nesterov=True), model, comm=comm)


def test_steps_and_hooks_of_the_optimizer_still_happen(comm):
    """GEM and DC-ASGD read the momentum and step without it; EAMSGD steps in Nesterov's form; the flags come back."""
    for name in ("GEM", "DCASGD", "EAMSGD"):
        model = Slope(comm.rank)
        inner, seen = sgd(model, 0.1, momentum=0.9), []
        optimizer = KINDS[name](inner, model, communication_window=2, comm=comm)
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        one_step(model, optimizer)
        scheduler.step()
        group = inner.param_groups[0]
        assert (len(seen), group["momentum"], group["nesterov"], group["lr"]) == (1, 0.9, False, 0.05)
        optimizer.finish()
