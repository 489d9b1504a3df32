"""`mpidl.Synchronous` over dtypes, memory formats, buffers and scalers; what it counts, and how it stops."""

from __future__ import annotations

import pytest
import torch
from training_helpers import assert_alike, batch, loss_of, mlp, union

import mpidl

WITH_OTHERS = True
ANY_MPI = True


def test_bfloat16_model_is_reduced_in_float32(comm):
    """Sums of small integers are exact in float32 and would not be in bfloat16 (256 + 1 is 256 there)."""
    model = torch.nn.Linear(3, 2, bias=False).bfloat16()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.5), model, comm=comm)
    value = 256.0 if comm.rank == 0 else 1.0
    (model.weight * value).sum().backward()
    mean = torch.tensor((256.0 + comm.size - 1) / comm.size).bfloat16()
    assert model.weight.grad.dtype == torch.bfloat16
    assert torch.equal(model.weight.grad, mean.expand(2, 3))
    optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)


def test_a_model_of_several_dtypes(comm):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4).double(), torch.nn.Linear(4, 2), torch.nn.Linear(2, 2).half())
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, bucket_cap_mb=1e-4)
    sum((p * (comm.rank + 1)).sum().double() for p in model.parameters()).backward()
    for p in model.parameters():
        expected = torch.full_like(p, (comm.size + 1) / 2)
        assert torch.equal(p.grad, expected), (p.dtype, p.grad)
    optimizer.finish()


@pytest.mark.parametrize("format_of", ["parameters", "gradients"])
def test_channels_last(comm, format_of):
    torch.manual_seed(1)
    plain = torch.nn.Conv2d(3, 5, 3, dtype=torch.float64)
    torch.manual_seed(1)
    model = torch.nn.Conv2d(3, 5, 3, dtype=torch.float64)
    inputs = [
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(8)
    ]
    if format_of == "parameters":
        model = model.to(memory_format=torch.channels_last)
        assert not model.weight.is_contiguous()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    for _ in range(2):
        optimizer.zero_grad()
        plain.zero_grad()
        model(inputs[comm.rank].to(memory_format=torch.channels_last)).square().mean().backward()
        plain(torch.cat(inputs[: comm.size])).square().mean().backward()
        torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(model.bias.grad, plain.bias.grad, rtol=1e-11, atol=1e-13)
    optimizer.finish()


def test_gradient_whose_strides_differ_between_ranks(comm):
    """A gradient's own order in memory must not matter: here it is transposed on odd ranks."""
    model = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    base = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    if comm.rank % 2:
        model.weight.grad = torch.zeros(3, 4, dtype=torch.float64).t()
    (model.weight * base * (comm.rank + 1)).sum().backward()
    assert torch.equal(model.weight.grad, base * (comm.size + 1) / 2)
    optimizer.finish()


def test_buffers_are_broadcast_then_local_then_averaged(comm):
    model = torch.nn.BatchNorm1d(3, momentum=1.0).double()
    model.running_mean.fill_(comm.rank)
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    assert (model.running_mean == 0).all()  # rank 0's
    for _ in range(comm.rank + 1):
        optimizer.zero_grad()
        model(torch.full((4, 3), float(comm.rank), dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert (model.running_mean == comm.rank).all()
    optimizer.finish()
    last = comm.size - 1  # the only rank that stepped last: its statistics are everybody's before the mean
    expected = last if comm.size > 1 else 0
    assert (model.running_mean == expected).all(), model.running_mean
    assert_alike(comm, model)


def test_buffers_mean_and_local(comm):
    for mode in ("mean", "local"):
        model = torch.nn.BatchNorm1d(3, momentum=1.0).double()
        optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, buffers=mode)
        model(torch.full((4, 3), float(comm.rank), dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.finish()
        expected = (comm.size - 1) / 2 if mode == "mean" else comm.rank
        assert (model.running_mean == expected).all()


def test_nonfinite_gradients_are_counted_on_every_rank_and_pass_through(comm):
    """GradScaler needs to see the infinity on every rank, so that all ranks skip the same step."""
    model = mlp(torch.float32)
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (True, False):
        optimizer.zero_grad()
        loss = loss_of(model, batch(comm.rank, 0, dtype=torch.float32))
        scaler.scale(loss * (float("inf") if bad and comm.rank == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert unchanged == bad
    assert optimizer.statistics.nonfinite_rounds == 1
    assert scaler.get_scale() == 2.0
    optimizer.finish()
    assert_alike(comm, model)


def test_a_wish_to_stop_reaches_all_ranks_after_the_same_step(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    steps = 0
    while not optimizer.stopping:
        if steps == 3 and comm.rank == comm.size - 1:
            optimizer.request_stop()
        loss_of(model, batch(comm.rank, steps)).backward()
        optimizer.step()
        steps += 1
    assert steps == 4
    optimizer.finish()


def test_second_derivatives_and_gradients_that_are_not_accumulated(comm):
    """`torch.autograd.grad` on one rank only sends nothing; a gradient penalty through it is reduced once."""
    model, expected = mlp(), mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)

    def penalised(net, data):
        x = data[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return loss_of(net, data) + slope.square().mean()

    if comm.rank == 0:
        x = batch(0, 9)[0].requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        torch.autograd.grad(model(x).sum(), list(model.parameters()))
    penalised(model, batch(comm.rank, 0)).backward()
    penalised(expected, union(batch(rank, 0) for rank in range(comm.size))).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
    assert optimizer.statistics.rounds == 1
    optimizer.finish()


def test_frozen_and_unheld_parameters(comm):
    torch.manual_seed(comm.rank)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    held = [*model[0].parameters(), *model[2].parameters()]
    optimizer = mpidl.Synchronous(torch.optim.SGD(held, lr=0.1), model, comm=comm)
    assert_alike(comm, model)  # all of it was broadcast
    loss_of(model, batch(comm.rank, 0)).backward()
    assert model[0].weight.grad is None
    reduced, own = model[2].weight.grad, model[1].weight.grad
    assert torch.equal(comm.allreduce(reduced, "min"), comm.allreduce(reduced, "max"))
    if comm.size > 1:
        assert not torch.equal(comm.allreduce(own, "min"), comm.allreduce(own, "max"))
    optimizer.finish()


def test_statistics_count_bytes(comm):
    model = mlp(torch.float32)
    count = sum(p.numel() for p in model.parameters())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mpidl.Synchronous(inner, model, comm=comm, bucket_cap_mb=count * 3 / 2**20)  # two buckets
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step, dtype=torch.float32)).backward()
        optimizer.step()
    statistics = optimizer.statistics.as_dict()
    assert statistics["steps"] == statistics["rounds"] == 3
    assert statistics["bytes"] == 3 * 4 * count
    assert statistics["seconds_communicating"] > 0
    spent = [statistics[f"seconds_{what}"] for what in ("packing", "reducing", "waiting")]
    assert [len(of_buckets) for of_buckets in spent] == [2, 2, 2]
    assert all(seconds >= 0 for of_buckets in spent for seconds in of_buckets)
    if comm.shares_memory:
        assert sum(spent[1]) > 0
    assert sum(map(sum, spent)) <= statistics["seconds_communicating"]
    optimizer.finish()
