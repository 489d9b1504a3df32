"""`mpidl.Synchronous` in unusual training loops: copies, retries, resumed state, odd shapes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from training_helpers import assert_alike, batch, loss_of, mlp, union

import mpidl

WITH_OTHERS = True
ANY_MPI = True


def test_copies_of_the_model_and_the_users_own_hooks(comm):
    """A copy or a pickle of the model, such as one for a running average, sends nothing to other ranks."""
    model = mlp()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mpidl.Synchronous(inner, model, comm=comm)
    copied = torch.optim.swa_utils.AveragedModel(model), pickle.loads(pickle.dumps(model))
    for other in copied if comm.rank == 0 else ():  # on one rank only, so that a message would never be answered
        loss_of(other, batch(0, 0)).backward()
    assert optimizer.statistics.rounds == 0
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    inner.register_step_pre_hook(lambda *_: calls.append("pre"))
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    assert calls == ["pre", "post"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups is inner.param_groups
    optimizer.finish()


def test_a_fused_optimizer_under_gradscaler_takes_the_unscaled_step(comm):
    """torch's fused optimisers read the scale from an attribute that GradScaler sets, which must not reach them."""
    model, expected = mlp(torch.float32), mlp(torch.float32)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    optimizer = mpidl.Synchronous(inner, model, comm=comm)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(0, 0, dtype=torch.float32))).backward()
    scaler.step(optimizer)
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    loss_of(expected, batch(0, 0, dtype=torch.float32)).backward()
    plain.step()
    optimizer.finish()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_backward_that_failed_on_one_rank_can_be_repeated(comm):
    """The gradients of the failed backward were sent in part; after `zero_grad` none of these gradients may count."""
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, bucket_cap_mb=1e-5)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError("on this rank only")

    if comm.rank == 0:
        x = batch(0, 9)[0].requires_grad_()
        hook = model[2].register_forward_hook(lambda module, inputs, output: Fails.apply(output))
        with pytest.raises(MemoryError):
            model(x).sum().backward()
        hook.remove()
        assert optimizer._reducer._round is not None
        with pytest.raises(mpidl.ClosedError, match="interrupted"):
            optimizer.step()
        with pytest.raises(mpidl.ClosedError, match="interrupted"):
            optimizer.finish()
        optimizer.zero_grad()
    for p in model[4].parameters():  # used by the backward that failed, and not by the one that is repeated
        p.requires_grad_(False)
    loss_of(model, batch(comm.rank, 0)).backward()
    expected = mlp()
    loss_of(expected, union(batch(rank, 0) for rank in range(comm.size))).backward()
    assert model[4].weight.grad is None and model[4].bias.grad is None
    for p, q in zip(model[:4].parameters(), expected[:4].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
    optimizer.finish()


def test_gradients_of_no_sync_that_were_thrown_away(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    with optimizer.no_sync():
        loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.zero_grad()
    model[4](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    assert model[0].weight.grad is None  # no rank has used the layer since
    optimizer.step()
    optimizer.finish()


def test_optimizer_state_that_only_rank_0_has_loaded(comm):
    """Every rank gets the optimiser state of rank 0, as it gets its parameters; hyperparameters keep their types."""
    model = mlp().to(memory_format=torch.channels_last)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    if comm.rank == 0:
        loss_of(model, batch(0, 7)).backward()
        inner.step()
        inner.zero_grad()
    optimizer = mpidl.Synchronous(inner, model, comm=comm)
    assert isinstance(optimizer.param_groups[0]["betas"], tuple)
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)
    assert all(float(inner.state[p]["step"]) == 2 for p in model.parameters())


def test_optimizer_state_in_another_order_of_memory(comm):
    """Momentum is channels_last on a rank whose gradients were, and contiguous on a rank that never stepped."""
    torch.manual_seed(1)
    model = torch.nn.Conv2d(3, 5, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mpidl.Synchronous(inner, model, comm=comm)
    if comm.rank == comm.size - 1:  # the others have no batch at all
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.finish()
    momentum = inner.state[model.weight]["momentum_buffer"].contiguous()
    assert momentum.abs().sum() > 0
    assert torch.equal(comm.allreduce(momentum, "min"), comm.allreduce(momentum, "max"))


@pytest.mark.parametrize("kind", [mpidl.Synchronous, mpidl.Downpour])
def test_parameters_without_elements(comm, kind):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = torch.nn.Parameter(torch.zeros(0, 3))
            self.narrow = torch.nn.Parameter(torch.zeros(2, 0, dtype=torch.float16))
            self.scalar = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x):
            return self.empty.sum() + self.narrow.sum() + self.scalar * x

    model = Model()
    with kind(torch.optim.SGD(model.parameters(), lr=1.0), model, comm=comm) as optimizer:
        model(float(comm.rank + 1)).backward()
        optimizer.step()
    total = comm.size * (comm.size + 1) / 2
    assert model.scalar.item() == 1 - (total / comm.size if kind is mpidl.Synchronous else total)


def test_a_gradient_that_the_user_keeps_does_not_change(comm):
    """Gradients are views of the result buffer; the next result must lie elsewhere while the user keeps a view."""
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.0), model, comm=comm)
    kept, expected, places = [], [], []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        kept.append(model[0].weight.grad[:2].flatten())  # a part keeps all
        twin = mlp()
        loss_of(twin, union(batch(rank, step) for rank in range(comm.size))).backward()
        expected.append(twin[0].weight.grad[:2].flatten())
    torch.testing.assert_close(kept, expected, rtol=1e-11, atol=1e-13)
    kept.clear()
    for step in range(4):  # the user keeps no gradient: one buffer is enough, and nothing is copied
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        places.append([p.grad.data_ptr() for p in model.parameters()])
    assert places[1:] == places[:-1]
    flat = sorted(places[0])
    assert flat[-1] - flat[0] < 8 * sum(p.numel() for p in model.parameters())
    optimizer.finish()


def test_a_gradient_that_was_there_before_is_written_in_place(comm):
    """The user may hold the gradient: a flat buffer of the user's, or zeros of `zero_grad(set_to_none=False)`."""
    model = mlp()
    parameters = list(model.parameters())
    optimizer = mpidl.Synchronous(torch.optim.SGD(parameters, lr=0.1), model, comm=comm)
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    for step in range(2):
        loss_of(model, batch(comm.rank, step)).backward()
        assert torch.equal(flat, torch.cat([p.grad.flatten() for p in parameters])) and flat.any()
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    loss_of(model, batch(comm.rank, 2)).backward()
    held = [p.grad for p in parameters]
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, batch(comm.rank, 3)).backward()
    twin = mlp()
    loss_of(twin, union(batch(rank, 3) for rank in range(comm.size))).backward()
    for gradient, p, q in zip(held, parameters, twin.parameters(), strict=True):
        assert p.grad is gradient
        torch.testing.assert_close(gradient, q.grad, rtol=1e-11, atol=1e-13)
    optimizer.finish()


def test_a_parameter_with_gaps_in_memory(comm):
    model = mlp()
    model[0].weight = torch.nn.Parameter(torch.cat([model[0].weight.detach()] * 2, dim=1)[:, : model[0].in_features])
    assert not model[0].weight.is_contiguous()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    twin = mlp()
    loss_of(twin, union(batch(rank, 0) for rank in range(comm.size))).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
    optimizer.finish()
