"""`Downpour` and `AGN`: their rules to the last bit, their tails, and workers that never wait for each other."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from training_helpers import assert_alike, batch, loss_of, mlp

import mpidl
from mpidl.mpi import runtime

BOTH = [mpidl.Downpour, mpidl.AGN]
WITH_OTHERS = True
SIZES = (1, 2, 3, 4, (1, 1), (3, 1), (2, 2))
SERVERS = (0, 1, 2)


def run(kind, comm, window, steps, optimizer_of, dtype=torch.float64):
    model = mlp(dtype)
    with kind(optimizer_of(model.parameters()), model, communication_window=window, comm=comm) as optimizer:
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step, dtype=dtype)).backward()
            optimizer.step()
    return model, optimizer


def serial(steps, optimizer_of, dtype=torch.float64):
    model = mlp(dtype)
    optimizer = optimizer_of(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(0, step, dtype=dtype)).backward()
        optimizer.step()
    return model


def alone(comm):
    return comm.size == 1


@pytest.mark.whole_product  # only one size does anything
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_worker_with_window_1_is_plain_sgd_bit_for_bit(comm, kind, dtype):
    if not alone(comm):
        return
    for optimizer_of in (lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)):
        model, optimizer = run(kind, comm, 1, 30, optimizer_of, dtype)
        expected = serial(30, optimizer_of, dtype)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)
        assert optimizer.statistics.staleness == {0: 30}


@pytest.mark.whole_product  # only one size does anything
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("window", [2, 5])
def test_one_worker_with_a_longer_window_is_plain_sgd_too(comm, window):
    """A commit that met no other lands on the worker's own parameters: 0 ulp, where 2 per commit are allowed."""
    if not alone(comm):
        return
    model, optimizer = run(mpidl.Downpour, comm, window, 30, lambda p: torch.optim.SGD(p, lr=0.1))
    expected = serial(30, lambda p: torch.optim.SGD(p, lr=0.1))
    assert optimizer.statistics.commits == -(-30 // window)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer_of", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.01)])
def test_agn_1_is_downpour_1_bit_for_bit(comm, optimizer_of):
    """Steps are taken in turns, so that both runs exchange in the same order."""
    models = []
    for kind in (mpidl.Downpour, mpidl.AGN):
        model = mlp()
        with kind(optimizer_of(model.parameters()), model, communication_window=1, comm=comm) as optimizer:
            for step in range(6):
                for turn in range(comm.size):
                    if turn == comm.rank:
                        optimizer.zero_grad()
                        loss_of(model, batch(comm.rank, step)).backward()
                        optimizer.step()
                    comm.barrier()
        models.append(model)
        expected = {comm.rank: 1, comm.size - 1: 5} if comm.rank != comm.size - 1 else {comm.size - 1: 6}
        assert optimizer.statistics.staleness == expected
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


class Slope(torch.nn.Module):
    """Its gradient is a known integer vector, whatever its parameters are."""

    def __init__(self, rank):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000, dtype=torch.float64))
        self.slope = torch.arange(1000, dtype=torch.float64) * (rank + 1)

    def forward(self):
        return self.weight @ self.slope


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 10, 14])
def test_the_center_is_the_exact_sum_of_all_commits_tails_included(comm, kind, steps):
    """Rank r takes steps + r steps of its own integer gradient; windows of 4, so that most tails are short."""
    window = 4
    model = Slope(comm.rank)
    with kind(torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=window, comm=comm) as optimizer:
        for _ in range(steps + comm.rank):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    lengths = [steps + rank for rank in range(comm.size)]
    commits = [-(-length // window) for length in lengths]
    units = lengths if kind is mpidl.Downpour else commits  # AGN: each commit is a mean, the short last one too
    expected = -torch.arange(1000, dtype=torch.float64) * sum((r + 1) * n for r, n in enumerate(units))
    assert torch.equal(model.weight.detach(), expected)
    assert optimizer.statistics.commits == commits[comm.rank]
    assert optimizer.statistics.steps == lengths[comm.rank]


@pytest.mark.parametrize("kind", BOTH)
def test_center_is_read_without_disturbing_training(comm, kind):
    model = Slope(comm.rank)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=2, comm=comm)
    optimizer.zero_grad()
    model().backward()
    optimizer.step()
    before = model.weight.detach().clone()
    clock, center = optimizer.center()
    assert list(center) == ["weight"] and center["weight"].shape == (1000,)
    assert torch.equal(model.weight.detach(), before) and clock == 0 and (center["weight"] == 0).all()
    comm.barrier()  # from here on others may commit
    optimizer.step()
    clock, center = optimizer.center()
    assert clock >= 1 and center["weight"][1] < 0
    optimizer.finish()
    assert torch.equal(comm.allgather(model.weight.detach())[0], model.weight.detach())


def test_channels_last_and_bfloat16_models(comm):
    torch.manual_seed(2)
    model = torch.nn.Conv2d(3, 4, 3).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.weight.fill_(256.0)
    with mpidl.Downpour(
        torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=1, comm=comm
    ) as optimizer:
        if comm.rank == 0:  # put the center where bfloat16 cannot follow: 256.25 is 256 there
            optimizer._center.commit(np.full(optimizer._layout.count, 0.25, np.float32))
        comm.barrier()
        for _ in range(3):  # steps that move nothing must commit nothing: no rounding error leaks into the center
            model.weight.grad = torch.zeros_like(model.weight)
            model.bias.grad = torch.zeros_like(model.bias)
            optimizer.step()
        comm.barrier()
        _, center = optimizer.center()
        flat = np.empty(optimizer._layout.count, np.float32)
        optimizer._center.pull(flat)
        comm.barrier()  # all have read: rank 0 may move on
        assert (flat[: 4 * 27] == 256.25).all()
        assert center["weight"].shape == (4, 3, 3, 3) and center["weight"].dtype == torch.bfloat16
        model.weight.grad = torch.arange(108.0).reshape(4, 3, 3, 3).bfloat16() if comm.rank == 0 else None
        optimizer.step()
        comm.barrier()
        assert (optimizer.center()[1]["weight"] < 256).sum() > 100
    assert_alike(comm, model)
    assert (model.weight.detach().float() - (256 - torch.arange(108.0).reshape(4, 3, 3, 3))).abs().max() <= 1


def test_a_commit_that_is_not_finite_is_refused(comm):
    model = Slope(comm.rank)
    with mpidl.Downpour(
        torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=1, comm=comm
    ) as optimizer:
        model().backward()
        if comm.rank == 0:
            model.weight.grad[7] = float("nan")
        optimizer.step()
        assert torch.isfinite(model.weight).all()  # pulled anew
    assert optimizer.statistics.refused_commits == (1 if comm.rank == 0 else 0)
    expected = -torch.arange(1000, dtype=torch.float64) * sum(r + 1 for r in range(1, comm.size))
    assert torch.equal(model.weight.detach(), expected)


def test_a_wish_to_stop_reaches_every_worker(comm):
    model = Slope(comm.rank)
    with mpidl.AGN(torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=2, comm=comm) as optimizer:
        deadline = time.monotonic() + 30
        while not optimizer.stopping and time.monotonic() < deadline:
            if comm.rank == comm.size - 1 and optimizer.statistics.steps == 6:
                optimizer.request_stop()
            model().backward()
            optimizer.step()
            time.sleep(0.001)
        assert optimizer.stopping


@pytest.mark.parametrize("kind", BOTH)
def test_workers_of_unequal_speed_never_wait_and_finish_cleanly_50_times(world_comm, kind):
    """Speeds 1:2:3:4, both rules 50 times each. No clock is held to a bound: instead each worker stops before its last
    window until the next faster one has taken all its steps, so that one who waited for a slower one would never end.
    """
    comm, world = world_comm, runtime.mpi().COMM_WORLD
    window, steps, word = 3, 12, np.empty(1, np.int64)
    for number in range(10 if comm.servers else 50):
        model = Slope(comm.rank)
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=window, comm=comm)
        faster_is_done = world.Irecv(word, comm.rank - 1, tag=number) if comm.rank else None
        for step in range(steps):
            while step == steps - window and faster_is_done is not None and not faster_is_done.Test():
                time.sleep(0.0005)
            optimizer.zero_grad()
            model().backward()
            time.sleep(0.0005 * (comm.rank + 1))
            optimizer.step()
        if comm.rank + 1 < comm.size:
            world.Send(np.array([number]), comm.rank + 1, tag=number)
        optimizer.finish()
        units = steps if kind is mpidl.Downpour else steps // window
        total = units * sum(r + 1 for r in range(comm.size))
        assert torch.equal(model.weight.detach(), -torch.arange(1000, dtype=torch.float64) * total)


def test_batch_norm_statistics_are_averaged_at_the_end(comm):
    model = torch.nn.BatchNorm1d(3, momentum=1.0).double()
    with mpidl.Downpour(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm) as optimizer:
        model(torch.full((4, 3), float(comm.rank), dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert (model.running_mean == (comm.size - 1) / 2).all()
    assert_alike(comm, model)


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_move_in_memory_after_the_constructor(comm, kind):
    """`model.to()`, `p.data = ...` and the like give a parameter other memory, which is what must be exchanged."""
    model = Slope(comm.rank)
    with kind(torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=1, comm=comm) as optimizer:
        model.to(torch.float32).to(torch.float64)
        model().backward()
        optimizer.step()
    expected = -torch.arange(1000, dtype=torch.float64) * sum(r + 1 for r in range(comm.size))
    assert torch.equal(model.weight.detach(), expected)


def test_a_model_of_several_dtypes(comm):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    model = torch.nn.ParameterList(torch.zeros(3, dtype=dtype) for dtype in dtypes)
    with mpidl.Downpour(
        torch.optim.SGD(model.parameters(), lr=1.0), model, communication_window=1, comm=comm
    ) as optimizer:
        for p in model:
            p.grad = torch.full_like(p, -(comm.rank + 1.0))
        optimizer.step()
        comm.barrier()
        center = optimizer.center()[1]
    for p, dtype, copied in zip(model, dtypes, center.values(), strict=True):
        assert p.dtype == dtype == copied.dtype
        assert (p == comm.size * (comm.size + 1) / 2).all() and torch.equal(copied, p.detach())
