"""What makes asynchronous training fail, with its cure: the diseases that a quadratic shows in seconds.

All run in turns, so that staleness is exactly n - 1 and the bounds of theory can be held to.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from family_helpers import Bowl, center_of, in_turns, one_step, sgd, weight

import mpidl
from mpidl.parameter_server import gem
from mpidl.parameter_server.center.center import Center

WITH_OTHERS = True
ANY_MPI = True


def far(comm, kind, rounds, lr, window=1, momentum=0.0, **given):
    """Trains a bowl with its minimum at 0 in turns, one exchange a turn; returns how far from it the center ended."""
    model = Bowl(np.ones(3))
    optimizer = kind(sgd(model, lr, momentum=momentum), model, communication_window=window, comm=comm, **given)
    for _ in range(rounds):
        for turn in range(comm.size):
            if turn == comm.rank:
                for _ in range(window):
                    one_step(model, optimizer)
            comm.barrier()
    return ended(comm, optimizer)


def ended(comm, optimizer):
    """Ends training when all have come so far; returns how far from 0 the center is."""
    found = float(abs(center_of(optimizer)).max())
    comm.barrier()  # all have read it: who finishes may commit a tail
    optimizer.finish()
    return found


def test_the_delay_bound_of_theory_is_where_downpour_fails(world_comm):
    """x' = x - a * x[n - 1 steps before] is stable below a = 2 sin(pi / (4 n - 2))."""
    bound = 2 * math.sin(math.pi / (4 * world_comm.size - 2))
    assert far(world_comm, mpidl.Downpour, 60, 0.85 * bound) < 0.1
    assert far(world_comm, mpidl.Downpour, 60, 1.15 * bound) > 2


def test_downpour_diverges_with_long_windows_and_agn_and_dynsgd_do_not(world_comm):
    """Five steps of rate 1/2 reach the minimum almost: a = 1 - 2^-5, beyond the bound of two workers and more."""
    assert far(world_comm, mpidl.Downpour, 16, 0.5, window=5) > 10
    assert far(world_comm, mpidl.AGN, 16, 0.5, window=5) < 0.3
    assert far(world_comm, mpidl.DynSGD, 16, 0.5, window=5) < 0.3


def test_an_elastic_exchange_that_is_not_one_step_diverges(world_comm, monkeypatch):
    """All pull before any commits, as a server with separate calls allows: alpha acts like n * alpha."""
    comm = world_comm

    def apart(server, change, out):
        number, clock = server.clock.begin(), server.pull(out)
        before = out.copy()
        for part in server._order:
            here = slice(part.start, part.start + part.count)
            if part.count:
                out[here] = change(here, out[here])
        comm.barrier()  # all have pulled
        server.commit(out - before, number=number)
        comm.barrier()
        return number, clock

    def together():
        model = Bowl(np.arange(1.0, 4.0) * (1 + comm.rank))
        optimizer = mpidl.AEASGD(sgd(model, 0.1), model, communication_window=1, rho=5.0, learning_rate=0.16, comm=comm)
        # Not all the same distance from the center: moved within the first step, as a projection is.
        hook = optimizer.register_step_post_hook(lambda *_: model.weight.data.mul_(1 + comm.rank))
        for _ in range(40):
            one_step(model, optimizer)
            hook.remove()
            comm.barrier()
        return ended(comm, optimizer)

    assert together() < 1
    monkeypatch.setattr(Center, "exchange", apart)
    assert together() > 100


@pytest.mark.parametrize(("factor", "stable"), [(0.9, True), (1.1, False)])
def test_elastic_averaging_of_one_worker_is_stable_up_to_the_paper_s_alpha(world_comm, factor, stable):
    """(4 - 2 eta) / (4 - eta) for a curvature of 1; exact for one worker, who is here each rank by itself."""
    comm, eta = world_comm, 1.5
    alpha = factor * (4 - 2 * eta) / (4 - eta)
    model = Bowl(np.ones(3))
    optimizer = mpidl.AEASGD(sgd(model, eta), model, communication_window=1, rho=alpha, learning_rate=1.0, comm=comm)
    if comm.rank == 0:
        for _ in range(150):
            one_step(model, optimizer)
        assert (abs(center_of(optimizer)).max() < 0.05) == stable
        assert (abs(center_of(optimizer)).max() > 10) == (not stable)
    comm.barrier()
    optimizer.finish()


def test_gem_without_its_lower_clamp_diverges(world_comm, monkeypatch):
    """With noise in the gradients |theta - s| is often larger than |m|: a negative pi walks uphill."""

    def end(comm):
        model = Bowl(np.ones(5))
        noise = torch.Generator().manual_seed(comm.rank)
        optimizer = mpidl.GEM(sgd(model, 0.1, momentum=0.9), model, comm=comm)
        for _ in range(80):
            model.target = torch.randn(5, generator=noise, dtype=torch.float64)
            in_turns(comm, model, optimizer, 1)
            if abs(weight(model)).max() > 1e6:
                model.h = 0.0  # far enough
        found = comm.allreduce(torch.tensor([abs(center_of(optimizer)).max()]), "max").item()
        comm.barrier()
        optimizer.finish()
        return found

    assert end(world_comm) < 3
    monkeypatch.setattr(gem, "_CLAMP", (-math.inf, 5.0))
    assert end(world_comm) > 1000


def test_staleness_is_a_momentum_and_one_more_on_top_of_it_diverges(world_comm):
    """Mitliagkas et al. 2016: n workers have about 1 - 1/n already; a rate that is stable then is not with 0.9 more."""
    lr = 0.6 * 2 * math.sin(math.pi / (4 * world_comm.size - 2))
    assert far(world_comm, mpidl.Downpour, 60, lr) < 0.1
    assert far(world_comm, mpidl.Downpour, 60, lr, momentum=0.9) > 10
    assert far(world_comm, mpidl.Downpour, 60, lr / 20, momentum=0.9) < 2  # what remains is a smaller rate


def test_an_optimizer_s_state_is_kept_across_pulls_which_is_another_rule_than_to_begin_anew(world_comm):
    """Documented as chosen: moments and their step count go on; who clears them at each pull trains differently."""
    comm, found, counts = world_comm, [], []
    for clears in (False, True):
        model = Bowl(np.linspace(1.0, 3.0, 4))
        inner = torch.optim.Adam(model.parameters(), lr=0.1)
        optimizer = mpidl.AGN(inner, model, communication_window=2, comm=comm)
        for _ in range(3):
            in_turns(comm, model, optimizer, 2)
            counts.append(int(inner.state[model.weight]["step"]))
            if clears:
                inner.state.clear()
        found.append(center_of(optimizer))
        comm.barrier()
        optimizer.finish()
    assert counts == [2, 4, 6, 2, 2, 2]
    assert (abs(found[0] - found[1]) > 1e-3).all()


@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_elastic_workers_stop_where_spring_and_gradient_balance(world_comm, rho):
    """Thesis, Eq. 2.7: minima differ by worker; each stops |g| / rho from the center, however long it goes on."""
    comm, lr = world_comm, 0.02
    minimum = (comm.rank - (comm.size - 1) / 2) * np.arange(1.0, 4.0)
    model = Bowl(np.zeros(3), minimum)
    optimizer = mpidl.AEASGD(sgd(model, lr), model, communication_window=1, rho=rho, learning_rate=lr, comm=comm)
    in_turns(comm, model, optimizer, 200)
    reached, center = weight(model), center_of(optimizer)
    np.testing.assert_allclose(center, 0, atol=0.1)  # the mean of the minima
    np.testing.assert_allclose(reached - center, (minimum - reached) / rho, rtol=0.1, atol=0.1)
    assert abs(reached - minimum).max() > 0.3 * abs(minimum).max() * rho / (1 + rho)  # none is where it wanted to be
    comm.barrier()
    optimizer.finish()
