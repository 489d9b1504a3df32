"""Model averaging and DiLoCo: equal results, ranks that end at different times, and refused arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_helpers import Bowl, one_step, sgd, weight
from training_helpers import assert_alike, assert_close, batch, loss_of, mlp

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3)
START = np.linspace(-1, 2, 7)


def train(comm, kind, steps, optimizer_of=sgd, **given):
    model = mlp()
    optimizer = kind(optimizer_of(model), model, comm=comm, **given)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
    optimizer.finish()
    return model, optimizer


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def assert_same(one, two):
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_averaging_after_every_step_of_plain_sgd_is_synchronous_sgd(comm):
    model, optimizer = train(comm, mpidl.ModelAveraging, 12, communication_window=1)
    assert_close(model, train(comm, mpidl.Synchronous, 12)[0])
    assert_alike(comm, model)
    assert optimizer.statistics.rounds == 12


def test_a_warm_up_is_synchronous_sgd_whatever_the_optimizer(comm):
    """Moments agree too, so that Adam's steps do."""
    model, optimizer = train(comm, mpidl.ModelAveraging, 8, adam, communication_window=3, warmup_steps=8)
    assert_close(model, train(comm, mpidl.Synchronous, 8, adam)[0])
    assert optimizer.statistics.rounds == 8
    later = train(comm, mpidl.ModelAveraging, 15, adam, communication_window=3, warmup_steps=8)[1]
    assert later.statistics.rounds == 8 + 2 + 1  # windows begin behind it; the tail is a single step


@pytest.mark.parametrize("optimizer_of", [sgd, adam])
@pytest.mark.parametrize("window", [1, 4])
def test_diloco_with_a_plain_outer_step_of_1_is_model_averaging_bit_for_bit(comm, optimizer_of, window):
    one = train(comm, mpidl.DiLoCo, 10, optimizer_of, communication_window=window, outer_lr=1.0, outer_momentum=0.0)[0]
    assert_same(one, train(comm, mpidl.ModelAveraging, 10, optimizer_of, communication_window=window)[0])


def test_diloco_takes_the_mean_move_for_a_gradient_of_torch_s_nesterov(comm):
    """The right way round: an outer step leads from where the window began towards the mean, and past it."""
    lr, momentum, window, eta = 0.7, 0.9, 3, 0.1
    model = Bowl(START, np.arange(7) * 0.5 - comm.rank)
    optimizer = mpidl.DiLoCo(sgd(model, eta), model, communication_window=window, comm=comm)
    theta = torch.nn.Parameter(torch.tensor(START))
    outer = torch.optim.SGD([theta], lr=lr, momentum=momentum, nesterov=True)
    for _ in range(4):
        mean = np.zeros(7)
        for rank in range(comm.size):
            local = theta.detach().numpy().copy()
            for _ in range(window):
                local -= eta * (local - (np.arange(7) * 0.5 - rank))
            mean += local / comm.size
        theta.grad = theta.detach() - torch.tensor(mean)
        outer.step()
        for _ in range(window):
            one_step(model, optimizer)
        np.testing.assert_allclose(weight(model), theta.detach().numpy(), rtol=1e-12, atol=1e-13)
    optimizer.finish()


@pytest.mark.parametrize("kind", [mpidl.ModelAveraging, mpidl.DiLoCo])
@pytest.mark.parametrize("base", [3, 4])
def test_ranks_that_end_early_take_part_in_the_rounds_of_the_others(comm, kind, base):
    model = Bowl(START, float(comm.rank))
    optimizer = kind(sgd(model), model, communication_window=2, comm=comm)
    for _ in range(base + 3 * comm.rank):
        one_step(model, optimizer)
    expected = None
    if comm.size == 1:
        expected = optimizer.averaged()["weight"]
    optimizer.finish()
    assert_alike(comm, model)
    assert expected is None or torch.equal(expected, model.weight.detach())


@pytest.mark.parametrize("kind", [mpidl.ModelAveraging, mpidl.DiLoCo])
def test_averaged_returns_what_finish_leaves_and_changes_nothing(comm, kind):
    model = Bowl(START, float(comm.rank))
    optimizer = kind(sgd(model), model, communication_window=3, comm=comm)
    for _ in range(5):
        one_step(model, optimizer)
    before = weight(model)
    expected, common = optimizer.averaged()["weight"], optimizer.common_state()
    assert np.array_equal(weight(model), before)
    optimizer.finish()
    assert torch.equal(expected, model.weight.detach())
    for name, values in optimizer.common_state().items():
        assert np.array_equal(values, common[name])


@pytest.mark.parametrize("kind", [mpidl.ModelAveraging, mpidl.DiLoCo])
def test_a_rank_with_a_nan_is_left_out_and_goes_on_from_the_mean(comm, kind):
    model = Bowl(START)
    optimizer = kind(sgd(model), model, communication_window=2, comm=comm)
    for step in range(4):
        optimizer.zero_grad()
        model().backward()
        if step == 1 and comm.rank == 0:
            model.weight.grad[3] = float("nan")
        optimizer.step()
    optimizer.finish()
    assert optimizer.statistics.nonfinite_rounds == (2 if comm.size == 1 else 1) * (comm.rank == 0)
    assert comm.size == 1 or torch.isfinite(model.weight).all()
    assert optimizer.statistics.rounds == 2


def test_bytes_fall_with_the_window(comm):
    found = [train(comm, mpidl.ModelAveraging, 12, communication_window=w)[1].statistics.bytes for w in (1, 2, 6)]
    assert found[0] == 2 * found[1] == 6 * found[2] > 0


def test_a_wish_to_stop_reaches_every_rank_in_the_same_round(comm):
    model = Bowl(START)
    optimizer = mpidl.DiLoCo(sgd(model), model, communication_window=4, comm=comm)
    steps = 0
    while not optimizer.stopping:
        if comm.rank == comm.size - 1 and steps == 5:
            optimizer.request_stop()
        one_step(model, optimizer)
        steps += 1
    assert steps == 8
    optimizer.finish()


@pytest.mark.parametrize("kind", [mpidl.ModelAveraging, mpidl.DiLoCo])
def test_narrow_and_mixed_dtypes_and_channels_last(comm, kind):
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3).bfloat16(), torch.nn.Conv2d(4, 2, 1))
    model = model.to(memory_format=torch.channels_last)
    warm = {"warmup_steps": 1} if kind is mpidl.ModelAveraging else {}
    with kind(sgd(model, 0.01), model, communication_window=2, comm=comm, **warm) as optimizer:
        for _ in range(4):
            optimizer.zero_grad()
            model[1](model[0](torch.randn(2, 3, 5, 5).bfloat16()).float()).square().mean().backward()
            optimizer.step()
    assert_alike(comm, model)


BAD = [
    (mpidl.ModelAveraging, {"communication_window": 0}, "communication_window=0"),
    (mpidl.ModelAveraging, {"warmup_steps": -1}, "warmup_steps=-1"),
    (mpidl.DiLoCo, {"outer_lr": 0.0}, "outer_lr=0.0"),
    (mpidl.DiLoCo, {"outer_momentum": float("nan")}, "outer_momentum=nan"),
]


@pytest.mark.parametrize(("kind", "given", "says"), BAD)
def test_bad_hyperparameters_are_refused(comm, kind, given, says):
    model = mlp()
    mine = given if comm.rank == comm.size - 1 else {}
    with pytest.raises(mpidl.ArgumentError if mine else mpidl.MismatchError, match=says):
        kind(sgd(model), model, comm=comm, **mine)
