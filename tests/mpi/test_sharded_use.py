"""`mpidl.Synchronous(shard=True)` in loops that do more than one: accumulate, clip, save, load, end unevenly."""

from __future__ import annotations

import copy

import pytest
import torch
from copies import copied
from sharded_helpers import Net, data, same, same_state, train
from training_helpers import assert_alike, assert_close, batch, loss_of, mlp

import mpidl
from mpidl.mpi import runtime

WITH_OTHERS = True
ANY_MPI = True


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def both(comm, run, make=momentum, model_of=mlp, ranks=None):
    """Runs a loop with and without shards; returns both models and optimisers."""
    found = []
    for shard in (False, True):
        model = model_of()
        optimizer = mpidl.Synchronous(make(model.parameters()), model, comm=(ranks or comm), shard=shard)
        run(model, optimizer)
        optimizer.finish()
        found.append(model)
    same(found[1], found[0])
    assert_alike(comm, found[1])
    return found


def test_uneven_loaders_and_a_scheduler(comm):
    def run(model, optimizer):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        for step in range(2 + comm.rank):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step)).backward()
            optimizer.step()
            schedule.step()

    both(comm, run)
    both(comm, run, adam)


def test_uneven_loaders_across_nodes(comm, monkeypatch):
    def run(model, optimizer):
        for step in range(2 + comm.rank):
            optimizer.zero_grad()
            sum((p * (step + 1)).sum() for p in model.parameters()).backward()
            optimizer.clip_grad_norm_(1e9)
            optimizer.step()

    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 2) as ranks:
        both(comm, run, ranks=ranks)


def test_no_sync_and_samples_and_unused_between(comm):
    def run(model, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            with optimizer.no_sync():
                loss_of(model, batch(comm.rank, step)).backward()
            with optimizer.samples(comm.rank + step + 1):
                loss_of(model, batch(comm.rank, step + 7)).backward()
            optimizer.step()
            model.zero_grad()  # not the optimizer's
            model[4](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
            optimizer.step()

    both(comm, run)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_not_zeroed_add_up(comm, create_graph):
    """Unsharded, the earlier mean goes through the reduction again: equal to round-off."""
    models = []
    for shard in (False, True):
        model = mlp()
        optimizer = mpidl.Synchronous(momentum(model.parameters()), model, comm=comm, shard=shard)
        for step in range(4):
            if step == 2:
                model[4](torch.ones(1, 8, dtype=torch.float64)).sum().backward()  # the rest stays what it was
            loss_of(model, batch(comm.rank, step)).backward(create_graph=create_graph)
            optimizer.step()
            torch.autograd.grad(loss_of(model, batch(comm.rank, 3)), list(model.parameters()))
        optimizer.zero_grad()
        optimizer.finish()
        models.append(model)
    assert_close(models[1], models[0])
    assert_alike(comm, models[1])


def test_gradients_thrown_away_by_the_model(comm):
    def run(model, optimizer):
        for step in range(3):
            loss = loss_of(model, batch(comm.rank, step))
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            model.zero_grad()
            loss.backward()
            model[4].bias.grad = None  # left out of this step
            optimizer.step()

    both(comm, run)


def test_clipping_is_torchs_to_round_off(comm):
    models, norms = [], []
    for shard in (False, True):
        model = mlp()
        optimizer = mpidl.Synchronous(momentum(model.parameters()), model, comm=comm, shard=shard)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step)).backward()
            norms.append(optimizer.clip_grad_norm_(0.1))
            optimizer.step()
        optimizer.finish()
        models.append(model)
    torch.testing.assert_close(torch.stack(norms[:4]), torch.stack(norms[4:]), rtol=1e-12, atol=0)
    assert_close(models[1], models[0])
    assert_alike(comm, models[1])


def test_channels_last_and_a_scalar_and_parameters_without_elements(comm):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
            self.turned = torch.nn.Parameter(torch.randn(9, 11).t())
            self.scalar = torch.nn.Parameter(torch.tensor(0.5))
            self.empty = torch.nn.Parameter(torch.zeros(0, 3))

        def forward(self, x):
            return self.conv(x).square().mean() * self.scalar + self.turned.sum() + self.empty.sum()

    states = []

    def run(model, optimizer):
        strides = [p.stride() for p in model.parameters()]
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(comm.rank + 10 * step))
            model(x).backward()
            optimizer.step()
        assert [p.stride() for p in model.parameters()] == strides
        states.append(optimizer.full_state_dict())

    both(comm, run, adam, Odd)
    same_state(states[1], states[0])


def test_a_model_of_several_dtypes(comm):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.wide, self.narrow = torch.nn.Linear(6, 40).double(), torch.nn.Linear(40, 3).bfloat16()

    def run(model, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            x, _ = data(comm.rank, step, torch.float64)
            model.narrow(model.wide(x).bfloat16()).square().mean().backward()
            optimizer.step()

    both(comm, run, adam, Mixed)


def test_state_of_before_is_cut_and_full_state_goes_anywhere(comm):
    """Steps without mpidl, unsharded, sharded, on one rank, sharded again equal steps of one optimiser."""
    expected, plain = train(comm, adam, shard=False, steps=12)
    model, first = train(comm, adam, shard=False, steps=3)
    first.finish()
    state = copy.deepcopy(first.state_dict())
    model, second = train(comm, adam, shard=True, steps=3, begin=3, model=model, load=state)
    state = second.full_state_dict()
    second.finish()
    model, third = train(comm, adam, shard=False, steps=3, begin=6, model=model, load=state)
    third.finish()
    optimizer = mpidl.Synchronous(third._inner, model, comm=comm, shard=True)  # state that is there already
    for step in range(9, 12):
        optimizer.zero_grad()
        x, y = data(comm.rank, step, torch.float32)
        ((model(x, (step + comm.rank) % 4 == 1) - y) ** 2).mean().backward()
        optimizer.step()
    same(model, expected)
    same_state(optimizer.full_state_dict(), plain.state_dict())
    optimizer.finish()
    plain.finish()


def test_full_state_of_other_ranks(comm):
    """The full state that all ranks saved loads on a single rank, and the other way round."""
    model, optimizer = train(comm, adam, shard=True, steps=4)
    full = optimizer.full_state_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if comm.rank == 0:
        alone = mpidl.Communicator(runtime.mpi().COMM_SELF)
        other = Net()
        other.load_state_dict(weights)
        single = mpidl.Synchronous(adam(other.groups()), other, comm=alone, shard=True)
        single.load_state_dict(full)
        same_state(single.full_state_dict(), full)
        single.finish()
        alone.free()
    optimizer.load_state_dict(full)
    same_state(optimizer.full_state_dict(), full)
    optimizer.finish()


def test_the_local_part_loads_where_it_was_saved(comm):
    expected, whole = train(comm, adam, shard=True, steps=6)
    whole.finish()
    model, optimizer = train(comm, adam, shard=True, steps=3)
    local = copy.deepcopy(optimizer.state_dict())
    optimizer.finish()
    model, optimizer = train(comm, adam, shard=True, steps=3, begin=3, model=model, load=local)
    same(model, expected)
    wrong = copy.deepcopy(local)
    wrong["shard"]["rank"] = comm.rank + 1
    with pytest.raises(mpidl.ArgumentError, match=rf"part of rank {comm.rank + 1} of {comm.size}.*full_state_dict"):
        optimizer.load_state_dict(wrong)
    full = optimizer.full_state_dict()
    full["state"][0]["exp_avg"] = full["state"][0]["exp_avg"][:2]
    with pytest.raises(mpidl.ArgumentError, match=r"'exp_avg' of parameter first\.weight has shape \(2, 6\)"):
        optimizer.load_state_dict(full)
    optimizer.finish()


def test_exclusive_lets_one_rank_write(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(momentum(model.parameters()), model, comm=comm, shard=True)
    before = [p.detach().clone() for p in model.parameters()]
    with mpidl.exclusive(model) as mine, torch.no_grad():
        if mine:
            for p in model.parameters():
                p.mul_(2)
    assert comm.allreduce(torch.tensor([float(mine)])).item() == 1
    assert all(torch.equal(p, 2 * q) for p, q in zip(model.parameters(), before, strict=True))
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    with mpidl.exclusive(model) as mine:
        if mine:
            model.load_state_dict(mlp(seed=5).state_dict())
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.finish()
    same(model, mlp(seed=5))
    with mpidl.exclusive(model) as mine:  # nobody shares it any more
        assert mine


def test_exclusive_with_an_exception_and_across_nodes(comm, monkeypatch):
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 2) as ranks:
        model = mlp()
        with mpidl.Synchronous(momentum(model.parameters()), model, comm=ranks, shard=True) as optimizer:
            with mpidl.exclusive(model) as mine, torch.no_grad():
                if mine:
                    model[0].weight.zero_()
            assert not model[0].weight.any()
            try:
                with mpidl.exclusive(model) as mine:
                    if mine:
                        raise KeyError("planted")
            except KeyError:
                assert mine
            loss_of(model, batch(comm.rank, 0)).backward()
            optimizer.step()
    assert_alike(comm, model)


def test_hooks_and_copies_and_files(comm, tmp_path):
    model = mlp()
    inner = momentum(model.parameters())
    optimizer = mpidl.Synchronous(inner, model, comm=comm, shard=True)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    assert calls == ["post"]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    copied_model = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied_model.parameters():
            p.zero_()  # everybody's own
    torch.save(model[0].bias.detach(), tmp_path / "bias")
    assert (tmp_path / "bias").stat().st_size < 4096  # not all weights
    loss_of(model, batch(comm.rank, 1)).backward()
    optimizer.step()
    assert_alike(comm, model)
    optimizer.finish()


@pytest.mark.parametrize("zero", [True, False])
def test_reentrant_checkpointing_of_a_layer_used_twice(comm, zero):
    """A bucket may be launched before its gradient is whole, and is sent again."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            self.first, self.again = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

        def forward(self, x):
            x = x.clone().requires_grad_()
            for layer in (self.first, self.again, self.again):
                x = torch.tanh(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True))
            return x.sum(1, keepdim=True)

    models = []
    for shard in (False, True):
        model = Twice()
        options = {"comm": comm, "bucket_cap_mb": 1e-5, "shard": shard}
        with mpidl.Synchronous(momentum(model.parameters()), model, **options) as optimizer:
            for step in range(3):
                if zero:
                    optimizer.zero_grad()
                loss_of(model, batch(comm.rank, step)).backward()
                optimizer.step()
            assert optimizer.statistics.rounds == 3
        models.append(model)
    assert_close(models[1], models[0])
    assert_alike(comm, models[1])
