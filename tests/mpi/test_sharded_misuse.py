"""Each way to leave or misuse the memory in which `shard=True` keeps the weights: refused by name, on every rank."""

from __future__ import annotations

import errno
import gc
import os

import pytest
import torch
from known import named_segments
from training_helpers import abandon, assert_alike, batch, loss_of, mlp

import mpidl
from mpidl.mpi import shared_memory

WITH_OTHERS = True
ANY_MPI = True


def sharded(comm, model=None, make=None):
    model = model or mlp()
    inner = make(model.parameters()) if make else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, mpidl.Synchronous(inner, model, comm=comm, shard=True)


def assign(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


LEAVING = {
    "double": (lambda model: model.float(), r"0\.weight"),
    "assign": (assign, r"0\.weight"),
    "share_memory": (lambda model: model.share_memory(), r"0\.weight"),
    "data": (lambda model: setattr(model[2].bias, "data", torch.zeros(8, dtype=torch.float64)), r"2\.bias"),
    "turned": (lambda model: setattr(model[0].weight, "data", model[0].weight.data[:, :1]), r"0\.weight"),
}


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("when", ["before backward", "before step"])
@pytest.mark.parametrize("who", ["all", "one"])
def test_parameters_that_leave(comm, name, when, who):
    model, optimizer = sharded(comm)
    leave, parameter = LEAVING[name]
    if when == "before step":
        loss_of(model, batch(comm.rank, 0)).backward()
    parameters = list(model.parameters())
    if who == "all" or comm.rank == comm.size - 1:
        leave(model)
    with pytest.raises(mpidl.ArgumentError, match=rf"parameter {parameter} has left"):
        if when == "before step":
            optimizer.step()
        else:
            sum(p.sum() for p in parameters).backward()
    abandon(optimizer)


def test_writing_on_every_rank_is_noticed(comm):
    model, optimizer = sharded(comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    for close in (optimizer.step, optimizer.finish):
        with pytest.raises(mpidl.ArgumentError, match=r"parameter 2\.weight was written in place.*mpidl\.exclusive"):
            close()
    abandon(optimizer)


def test_a_mark_has_no_memory_and_goes_with_the_end(comm):
    model, optimizer = sharded(comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    for p in model.parameters():
        assert p.grad.shape == p.shape and p.grad.isnan().all()
        assert p.grad.untyped_storage().nbytes() == 8
    optimizer.step()
    optimizer.finish()
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_of_the_users_own(comm):
    model, optimizer = sharded(comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    if comm.rank == 0:
        model[4].bias.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(mpidl.ArgumentError, match=r"gradient of parameter 4\.bias was replaced"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    optimizer.finish()


def test_the_users_own_optimizer_beside_mpidl(comm):
    model, optimizer = sharded(comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    with pytest.raises(mpidl.ArgumentError, match=r"sharded: call step\(\) of mpidl"):
        optimizer._inner.step()
    optimizer.step()
    local = optimizer._inner.state_dict()
    assert local["shard"]["rank"] == comm.rank
    optimizer._inner.load_state_dict(local)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    optimizer._inner.load_state_dict(optimizer.full_state_dict())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    optimizer.finish()
    assert optimizer._inner.state_dict()["shard"]["ranks"] == comm.size
    with pytest.raises(mpidl.ArgumentError, match=r"this SGD was given to.*make a new one"):
        mpidl.Synchronous(optimizer._inner, model, comm=comm)


class LARS(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})


REFUSED = {
    "LBFGS": (torch.optim.LBFGS, "inner products"),
    "Adafactor": (torch.optim.Adafactor, "rows and columns"),
    "SparseAdam": (torch.optim.SparseAdam, "sparse"),
    "LARS": (LARS, "not known to treat every element by itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_are_not_elementwise(comm, name):
    make, reason = REFUSED[name]
    with pytest.raises(mpidl.ArgumentError, match=rf"shard=True cannot be used with {name}: .*{reason}"):
        sharded(comm, make=make)


def test_muon(comm):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(mpidl.ArgumentError, match="Muon: it orthogonalises whole matrices"):
        sharded(comm, model, torch.optim.Muon)


def test_one_memory_under_two_names_and_arguments_that_differ(comm):
    model = mlp()
    model[4].bias.data = model[2].bias.data[:1]
    with pytest.raises(mpidl.ArgumentError, match=r"parameters 2\.bias and 4\.bias lie in one memory|4\.bias and 2\.b"):
        sharded(comm, model)
    model = mlp()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    if comm.size > 1:
        with pytest.raises(mpidl.MismatchError, match="shard differs"):
            mpidl.Synchronous(inner, model, comm=comm, shard=comm.rank == 0)
    with pytest.raises(mpidl.ArgumentError, match="shard='yes'; expected True or False"):
        mpidl.Synchronous(inner, model, comm=comm, shard="yes")


def test_without_room_nothing_has_changed(comm, monkeypatch):
    if comm.size == 1:
        return
    model = torch.nn.Linear(120, 128)
    real, addresses, nbytes = shared_memory._attempt, [p.data_ptr() for p in model.parameters()], 4 * 128 * 121

    def full(path, size, *rest):
        if abs(size - nbytes) < 4 * 64 * comm.size:  # the weights, not the segment of the collectives
            monkeypatch.setattr(os, "posix_fallocate", fail)
        return real(path, size, *rest)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if comm.rank == comm.size - 1:
        monkeypatch.setattr(shared_memory, "_attempt", full)
    with pytest.raises(mpidl.SharedMemoryError, match=r"no room for the 0\.\d MiB .*MPIDL_SHARED_MEMORY=0"):
        sharded(comm, model)
    monkeypatch.undo()
    assert [p.data_ptr() for p in model.parameters()] == addresses
    _, optimizer = sharded(comm, model)
    optimizer.finish()


def test_memory_is_private_after_finish_and_after_deletion(comm):
    model, optimizer = sharded(comm)
    kept = model[0].weight.detach()  # a view of the memory that goes
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    values = [p.detach().clone() for p in model.parameters()]
    optimizer.finish()
    comm.barrier()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(comm.rank)
    comm.barrier()
    for p, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(p, value + comm.rank)
    assert torch.equal(kept, values[0])
    optimizer.state_dict()
    with pytest.raises(mpidl.ClosedError, match="full_state_dict"):
        optimizer.full_state_dict()

    model, optimizer = sharded(comm)
    values = [p.detach().clone() for p in model.parameters()]
    abandon(optimizer)
    del optimizer
    gc.collect()
    comm.barrier()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(comm.rank)
    comm.barrier()
    for p, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(p, value + comm.rank)


def test_nothing_is_left_in_shared_memory(comm):
    _, optimizer = sharded(comm)
    assert not named_segments(comm)
    optimizer.finish()


def test_ranks_that_do_different_things(comm):
    if comm.size == 1:
        return
    model, optimizer = sharded(comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    with pytest.raises(mpidl.MismatchError, match=r"come apart.*rank 1: clip_grad_norm_"):
        if comm.rank == 1:
            optimizer.clip_grad_norm_(1.0)
        else:
            optimizer.step()
    optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)


def test_use_after_finish_and_stale_graphs(comm):
    model, optimizer = sharded(comm)
    loss = loss_of(model, batch(comm.rank, 0))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the weights of that forward are gone
    abandon(optimizer)
    model, optimizer = sharded(comm)
    optimizer.finish()
    optimizer.finish()
    with pytest.raises(mpidl.ClosedError, match="finish"):
        optimizer.step()
