"""Arrays on a device through `Communicator` and `Synchronous`: the device is the host's, see tests/cuda_host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import known
import pytest
import torch
from training_helpers import assert_alike, assert_close, batch, loss_of, mlp, union

import mpidl
from mpidl.errors import DtypeError, MismatchError

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_host"))
from fake import Fake, fake_device
from host_build import finish, host_cuda, launches

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 4)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "complex64")


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Memory that only the device may touch: whoever else does ends the job."""
    with fake_device() as made:
        yield made


@pytest.fixture
def posing() -> Iterator[Fake]:
    """Every tensor poses as the device's, so that torch can train on it."""
    with fake_device(everything=True) as made:
        yield made


def placed(fake, comm, dtype, op="sum", count=1001):
    return fake.tensor(known.own("torch", dtype, comm.rank, count, op))


def reduction(comm, dtype, op, count=1001):
    return known.reduced(op, [known.values(r, count, dtype, op) for r in range(comm.size)], "torch", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(comm, fake, dtype):
    for op in known.OPS:
        if not known.defined(op, dtype):
            continue
        x = placed(fake, comm, dtype, op)
        result = comm.allreduce(x, op)
        known.assert_same(fake.read(result), reduction(comm, dtype, op))
        known.assert_same(fake.read(x), known.own("torch", dtype, comm.rank, 1001, op))
        assert comm.allreduce(x, op, out=x) is x
        known.assert_same(fake.read(x), reduction(comm, dtype, op))
    root = comm.reduce(placed(fake, comm, dtype), root=comm.size - 1)
    if comm.rank == comm.size - 1:
        known.assert_same(fake.read(root), reduction(comm, dtype, "sum"))
    count = 5 * comm.size
    block = comm.reduce_scatter(placed(fake, comm, dtype, count=count))
    mine = slice(5 * comm.rank, 5 * comm.rank + 5)
    known.assert_same(fake.read(block), reduction(comm, dtype, "sum", count)[mine])


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_moves(comm, fake, dtype):
    count = 6 * comm.size
    inputs = [known.own("torch", dtype, rank, count) for rank in range(comm.size)]
    x = fake.tensor(inputs[comm.rank])
    known.assert_same(fake.read(comm.allgather(x)), torch.stack(inputs))
    mine = slice(6 * comm.rank, 6 * comm.rank + 6)
    known.assert_same(fake.read(comm.alltoall(x)), torch.cat([one[mine] for one in inputs]))
    assert comm.broadcast(x, root=comm.size - 1) is x
    known.assert_same(fake.read(x), inputs[-1])


def test_strided_arrays(comm, fake):
    whole = fake.tensor(torch.arange(12.0).reshape(3, 4) * (comm.rank + 1))
    factor = sum(range(1, comm.size + 1))
    assert torch.equal(fake.read(comm.allreduce(whole.T)), torch.arange(12.0).reshape(3, 4).T * factor)
    comm.broadcast(whole[:, 1], root=comm.size - 1)
    expected = torch.arange(12.0).reshape(3, 4) * (comm.rank + 1)
    expected[:, 1] = torch.tensor([1.0, 5.0, 9.0]) * comm.size
    assert torch.equal(fake.read(whole), expected)


def test_a_request_follows_the_stream_and_its_result_is_not_waited_for(comm, fake):
    x = fake.tensor(torch.full((64,), float(comm.rank + 1)))
    y = fake.tensor(torch.zeros(64))
    mpidl.pack([x], y, scale=2.0)  # still under way when the reduction is asked for
    request = comm.iallreduce(y)
    while not request.test():
        pass
    result = request.wait()
    mpidl.unpack(result, [x])
    assert fake.read(x).eq(2.0 * sum(range(1, comm.size + 1))).all()


def test_one_rank_may_be_on_the_host(comm, fake):
    data = torch.full((10,), float(comm.rank))
    result = comm.allreduce(data if comm.rank == 0 else fake.tensor(data))
    assert (result if comm.rank == 0 else fake.read(result)).eq(sum(range(comm.size))).all()


def test_a_device_that_cannot_be_used_is_refused_on_every_rank(comm, fake, monkeypatch):
    where = fake.where
    monkeypatch.setattr("mpidl.arrays.view._torch_device", lambda x: where(x) if comm.rank else "cuda:0")
    monkeypatch.setattr("mpidl.native.cuda.library", _no_library)
    with pytest.raises(
        DtypeError if comm.rank == 0 else MismatchError, match="on cuda:0: mpidl was built without CUDA"
    ):
        comm.allreduce(torch.zeros(3))


def _no_library():
    from mpidl.native.cuda import Cuda

    return Cuda(Path("/nowhere"))


def step(fake, optimizer, model, data):
    optimizer.zero_grad()
    loss_of(model, data).backward()
    fake.synchronize()  # what torch does next on the device's stream is ordered behind
    optimizer.step()


@pytest.mark.parametrize("cap", [1e-5, 25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_synchronous_trains_on_a_device(comm, posing, cap, dtype):
    expected = mlp(dtype)
    reference = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    model = mlp(dtype, seed=comm.rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mpidl.Synchronous(inner, model, comm=comm, bucket_cap_mb=cap)
    posing.synchronize()
    for number in range(6):
        step(posing, optimizer, model, batch(comm.rank, number, dtype=dtype))
        if dtype == torch.float64:
            reference.zero_grad()
            loss_of(expected, union(batch(rank, number) for rank in range(comm.size))).backward()
            reference.step()
        assert optimizer.statistics.nonfinite_rounds == 0
    optimizer.finish()
    posing.synchronize()
    if dtype == torch.float64:
        assert_close(model, expected)
    posing.everything = False
    assert_alike(comm, model)


def test_a_bucket_is_packed_and_unpacked_by_one_launch(comm, posing):
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    before = launches()
    for number in range(3):
        step(posing, optimizer, model, batch(comm.rank, number))
    assert launches() == before + 3 * 2
    optimizer.finish()


def test_unused_parameters_weights_and_nonfinite_gradients(comm, posing):
    """Rank 0 uses one layer only and has no samples; a NaN there must not get through, one elsewhere is counted."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False) for _ in range(3)]).double()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    posing.synchronize()
    x = torch.ones(1, 2, dtype=torch.float64) * (comm.rank + 1)
    weight = comm.rank if comm.size > 1 else 1
    with optimizer.samples(weight):
        used = [model[0], model[1]] if comm.rank else [model[0]]
        (sum(layer(x).sum() for layer in used) * (float("nan") if weight == 0 else 1.0)).backward()
    posing.synchronize()
    total = sum(range(comm.size)) or 1
    mean = sum(r * (r + 1) for r in range(comm.size)) / total if comm.size > 1 else 1.0
    assert torch.allclose(model[0].weight.grad, torch.full((1, 2), mean, dtype=torch.float64), rtol=1e-12)
    if comm.size > 1:
        assert torch.allclose(model[1].weight.grad, torch.full((1, 2), mean, dtype=torch.float64), rtol=1e-12)
    assert model[2].weight.grad is None
    assert optimizer.statistics.nonfinite_rounds == 0
    optimizer.zero_grad()
    (model[0](x).sum() * (float("inf") if comm.rank == comm.size - 1 else 1.0)).backward()
    posing.synchronize()
    assert optimizer.statistics.nonfinite_rounds == 1
    optimizer.finish()


def test_gradients_that_change_after_they_were_packed(comm, posing):
    """A parameter reached again after its bucket was sent, or was on its way: the bucket is packed and sent again."""
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, bucket_cap_mb=1e-5)
    posing.synchronize()
    first, second = batch(comm.rank, 0), batch(comm.rank, 1)
    inner = torch.utils.checkpoint.checkpoint

    def twice(x):
        return inner(model, x, use_reentrant=True)

    x0, x1 = (data[0].clone().requires_grad_() for data in (first, second))
    (((twice(x0) - first[1]) ** 2).mean() + ((twice(x1) - second[1]) ** 2).mean()).backward()
    posing.synchronize()
    expected = mlp()
    for number in (0, 1):
        loss_of(expected, union(batch(rank, number) for rank in range(comm.size))).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    optimizer.finish()


def test_a_backward_on_another_stream_does_not_overtake(comm, posing):
    """The flat memory is read by the last scatter, on one stream, before the next gather, on another, overwrites it."""
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    posing.synchronize()
    loss_of(model, batch(comm.rank, 0)).backward()
    gradients = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    posing.stream = host_cuda().make("stream_make", 0)
    loss_of(model, batch(comm.rank, 1)).backward()
    posing.synchronize()
    finish(0)
    expected = mlp()
    loss_of(expected, union(batch(rank, 0) for rank in range(comm.size))).backward()
    for gradient, p in zip(gradients, expected.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-12, atol=1e-14)
    optimizer.finish()


def test_state_and_buffers_travel(comm, posing):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    adam = torch.optim.Adam(model.parameters(), lr=0.1 * (1 + comm.rank))
    if comm.rank == 0:
        model(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
        adam.step()
        adam.zero_grad()
    optimizer = mpidl.Synchronous(adam, model, comm=comm) if comm.size == 1 else None
    if optimizer is None:
        adam.param_groups[0]["lr"] = 0.1
        optimizer = mpidl.Synchronous(adam, model, comm=comm)
    posing.synchronize()
    posing.everything = False
    for p in model.parameters():
        for value in (adam.state[p]["exp_avg"], adam.state[p]["step"]):
            assert torch.equal(comm.allreduce(value, "min"), comm.allreduce(value, "max"))
    posing.everything = True
    with torch.no_grad():
        model[1].running_mean.fill_(float(comm.rank))
    optimizer._buffers = "local"  # torch's division would run before the copy that it must follow on a real stream
    optimizer.finish()


@pytest.mark.parametrize("algorithm", [mpidl.Downpour, mpidl.AGN])
def test_workers_train_on_a_device(comm, posing, algorithm):
    model = mlp(seed=comm.rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = algorithm(inner, model, comm=comm, communication_window=2)
    posing.synchronize()
    for number in range(5):
        step(posing, optimizer, model, batch(comm.rank, number))
    clock, center = optimizer.center()
    posing.synchronize()
    assert clock >= 2
    assert {name: one.shape for name, one in center.items()} == {n: p.shape for n, p in model.named_parameters()}
    optimizer.finish()
    posing.synchronize()
    posing.everything = False
    assert_alike(comm, model)
    if comm.size == 1 and algorithm is mpidl.Downpour:
        expected = mlp()
        reference = torch.optim.SGD(expected.parameters(), lr=0.01)
        for number in range(5):
            reference.zero_grad()
            loss_of(expected, batch(0, number)).backward()
            reference.step()
        assert_close(model, expected)


on_hardware = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device: this has never run on hardware"
)


def place(comm):
    return torch.device("cuda", comm.rank % torch.cuda.device_count())


@on_hardware
def test_reductions_on_hardware(comm):
    values = torch.arange(1000).fmod(7).bfloat16()
    x = values.to(place(comm)) * (comm.rank + 1)
    total = comm.allreduce(x)
    assert total.device == x.device
    assert torch.equal(total.cpu(), values * sum(range(1, comm.size + 1)))
    assert comm.allgather(x)[comm.rank].equal(x)


@on_hardware
def test_synchronous_trains_on_hardware(comm):
    expected = mlp()
    reference = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    model = mlp(seed=comm.rank).to(place(comm))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with mpidl.Synchronous(inner, model, comm=comm, bucket_cap_mb=5e-4) as optimizer:
        for number in range(8):
            optimizer.zero_grad()
            loss_of(model, [x.to(place(comm)) for x in batch(comm.rank, number)]).backward()
            optimizer.step()
            reference.zero_grad()
            loss_of(expected, union(batch(rank, number) for rank in range(comm.size))).backward()
            reference.step()
    assert_close(model.cpu(), expected, bound=1e-9)
