"""`mpidl.Synchronous` takes the very step that one rank would take on all ranks' samples together."""

from __future__ import annotations

import time

import pytest
import torch
from training_helpers import FEATURES, assert_alike, assert_close, batch, loss_of, mlp, union

import mpidl

WITH_OTHERS = True

OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def reference(model, optimizer, size, steps, batch_of=batch):
    """Trains on one rank with the samples of all ranks."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, union(batch_of(rank, step) for rank in range(size))).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_one_rank_with_all_samples(comm, name):
    expected = mlp()
    reference(expected, OPTIMIZERS[name](expected.parameters()), comm.size, 12)
    model = mlp(seed=comm.rank)  # the parameters of rank 0 must reach the other ranks
    optimizer = mpidl.Synchronous(OPTIMIZERS[name](model.parameters()), model, comm=comm)
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
    optimizer.finish()
    assert_close(model, expected)
    assert_alike(comm, model)


@pytest.mark.parametrize("cap", [1e-5, 5e-4, 25])
def test_every_bucket_size_reduces_every_gradient(comm, cap):
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, bucket_cap_mb=cap)
    loss_of(model, batch(comm.rank, 0)).backward()
    expected = mlp()
    loss_of(expected, union(batch(rank, 0) for rank in range(comm.size))).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    optimizer.finish()


def test_ragged_batches_are_weighed_by_their_samples(comm):
    def ragged(rank, step):
        return batch(rank, step, count=1 + (rank + step) % 3)

    expected = mlp()
    reference(expected, torch.optim.SGD(expected.parameters(), lr=0.1), comm.size, 6, ragged)
    model = mlp()
    with mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm) as optimizer:
        for step in range(6):
            data = ragged(comm.rank, step)
            optimizer.zero_grad()
            with optimizer.samples(len(data[0])):
                loss_of(model, data).backward()
            optimizer.step()
    assert_close(model, expected)


def test_a_rank_without_samples_does_not_count(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    count = 0 if comm.rank else 4
    with optimizer.samples(count):
        # A rank without samples still calls backward; even a NaN must not reach the others.
        (loss_of(model, batch(comm.rank, 0)) * (1.0 if count else float("nan"))).backward()
    expected = mlp()
    loss_of(expected, batch(0, 0)).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    optimizer.finish()


def test_uneven_loaders(comm):
    """Rank r has r + 2 batches; a step takes the mean over the ranks that still have one."""
    expected = mlp()
    inner = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for step in range(comm.size + 1):
        inner.zero_grad()
        here = [batch(rank, step) for rank in range(comm.size) if step < rank + 2]
        loss_of(expected, union(here)).backward()
        inner.step()
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, comm=comm)
    for step in range(comm.rank + 2):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
    optimizer.finish()
    assert_close(model, expected)
    assert_alike(comm, model)
    momenta = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    wanted = torch.cat([inner.state[p]["momentum_buffer"].flatten() for p in expected.parameters()])
    torch.testing.assert_close(momenta, wanted, rtol=1e-11, atol=1e-13)


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = torch.nn.Linear(FEATURES, 4, dtype=torch.float64)
        self.left = torch.nn.Linear(4, 1, dtype=torch.float64)
        self.right = torch.nn.Linear(4, 1, dtype=torch.float64)
        self.nobody = torch.nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, x, left):
        hidden = self.trunk(x)
        return self.left(hidden) if left else self.right(hidden)


def test_unused_parameters(comm):
    model, expected = Branches(), Branches()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    for _ in range(2):
        optimizer.zero_grad()
        (model(batch(comm.rank, 0)[0], comm.rank == 0) ** 2).mean().backward()
    sum((expected(batch(r, 0)[0], r == 0) ** 2).mean() for r in range(comm.size)).backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if name.startswith("nobody") or (name.startswith("right") and comm.size == 1):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad / comm.size, rtol=1e-12, atol=1e-14)
    optimizer.finish()


def test_shared_parameters_and_groups_and_scheduler(comm):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.a = torch.nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
            self.b = torch.nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x))).mean(1, keepdim=True)

    def build(model):
        groups = [{"params": [model.a.weight], "lr": 0.2}, {"params": [model.a.bias, model.b.bias], "lr": 0.05}]
        return torch.optim.SGD(groups, momentum=0.5)

    expected = Tied()
    inner = build(expected)
    schedule = torch.optim.lr_scheduler.StepLR(inner, step_size=2, gamma=0.1)
    for step in range(5):
        inner.zero_grad()
        loss_of(expected, union(batch(rank, step) for rank in range(comm.size))).backward()
        inner.step()
        schedule.step()
    model = Tied()
    optimizer = mpidl.Synchronous(build(model), model, comm=comm)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
        schedule.step()
    optimizer.finish()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in inner.param_groups]
    assert_close(model, expected)


def test_no_sync_accumulates_and_two_backwards_add_up(comm):
    for accumulate in (True, False):
        model, expected = mlp(), mlp()
        optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
        for part in range(3):
            if accumulate and part < 2:
                with optimizer.no_sync():
                    loss_of(model, batch(comm.rank, part)).backward()
            else:
                loss_of(model, batch(comm.rank, part)).backward()
        for part in range(3):
            loss_of(expected, union(batch(rank, part) for rank in range(comm.size))).backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
        assert optimizer.statistics.rounds == (1 if accumulate else 3)
        optimizer.finish()


def test_clipping_sees_the_mean(comm):
    model, ours, expected = mlp(), mlp(), mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    second = mpidl.Synchronous(torch.optim.SGD(ours.parameters(), lr=0.1), ours, comm=comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    loss_of(ours, batch(comm.rank, 0)).backward()
    loss_of(expected, union(batch(rank, 0) for rank in range(comm.size))).backward()
    wanted = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    assert wanted > 0.01
    norms = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01), second.clip_grad_norm_(0.01)
    for norm in norms:
        torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
    for p, q, r in zip(model.parameters(), expected.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(r.grad, q.grad, rtol=1e-11, atol=1e-14)
    optimizer.finish()
    second.finish()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_layer_used_twice(comm, reentrant):
    class Twice(torch.nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            torch.manual_seed(7)
            self.first = torch.nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
            self.again = torch.nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
            self.head = torch.nn.Linear(FEATURES, 1, dtype=torch.float64)
            self.checkpointed = checkpointed

        def forward(self, x):
            x = x.clone().requires_grad_()
            for layer in (self.first, self.again, self.again):
                if self.checkpointed:
                    x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
                else:
                    x = layer(x)
                x = torch.tanh(x)
            return self.head(x)

    model, expected = Twice(True), Twice(False)
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, bucket_cap_mb=1e-5)
    for step in range(3):
        optimizer.zero_grad()
        expected.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        loss_of(expected, union(batch(rank, step) for rank in range(comm.size))).backward()
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")
    assert optimizer.statistics.rounds == 3  # one per backward, nested ones included
    optimizer.finish()


@pytest.mark.parametrize("backwards", [False, True], ids=["used as defined", "used backwards"])
def test_buckets_travel_while_backward_goes_on(comm, backwards):
    """Before backward reaches the layer that was used first, buckets of the later ones have been launched.

    If layers are used in another order than that in which they are defined, only the first backward shows it.
    """
    launched = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            comm.barrier()  # every rank has sent the header of this backward
            time.sleep(0.01)
            now = optimizer._reducer._round
            launched.append(0 if now is None else now.launched)
            return gradient

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Linear(FEATURES, FEATURES, dtype=torch.float64) for _ in range(6)
            )

        def forward(self, x):
            for layer in reversed(self.layers) if backwards else self.layers:
                x = layer(Slow.apply(x.requires_grad_() if x.is_leaf else x))
            return x.mean(1, keepdim=True)

    model = Chain()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, bucket_cap_mb=1e-5)
    for step in range(2):
        optimizer.zero_grad()
        comm.barrier()
        loss_of(model, batch(comm.rank, step)).backward()
        before = launched[-2]  # with the gradients of one layer still missing
        assert before == 0 if backwards and step == 0 else before >= 4, launched
    layers = [index // 2 for index in optimizer.arrival]
    assert layers == sorted(layers, reverse=not backwards)
    optimizer.finish()
