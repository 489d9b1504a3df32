"""Gradients that no backward of the model has made: `step()` reduces them, and leaves the user's changes alone."""

from __future__ import annotations

import pytest
import torch
from training_helpers import abandon, assert_alike, assert_close, batch, loss_of, mlp, union

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3)


def synchronous(comm, model, **options):
    return mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, comm=comm, **options)


def by_autograd(model, data, other):
    parameters = list(model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss_of(model, data), parameters), strict=True):
        p.grad = gradient


def by_functional_call(model, data, other):
    x, y = data
    values = {name: p.detach() for name, p in model.named_parameters()}
    loss = torch.func.grad(lambda v: ((torch.func.functional_call(model, v, (x,)) - y) ** 2).mean())
    for name, gradient in loss(values).items():
        model.get_parameter(name).grad = gradient


def into_the_same_tensor(model, data, other):
    """As a program does that keeps its gradients in one flat buffer."""
    parameters = list(model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss_of(model, data), parameters), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.copy_(gradient)


def of_another_model(model, data, other):
    """The other model's own gradient must not change: it is the same tensor until the step."""
    other.load_state_dict(model.state_dict())
    other.zero_grad()
    loss_of(other, data).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = q.grad


def with_create_graph(model, data, other):
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss_of(model, data), parameters, create_graph=True)
    for p, gradient in zip(parameters, found, strict=True):
        p.grad = gradient


def as_one_flat_tensor(model, data, other):
    """All gradients are views of one tensor, with one version counter."""
    parameters = list(model.parameters())
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, data), parameters)])
    at = 0
    for p in parameters:
        p.grad = flat[at : at + p.numel()].view_as(p)
        at += p.numel()


MAKERS = [
    by_autograd,
    by_functional_call,
    into_the_same_tensor,
    of_another_model,
    with_create_graph,
    as_one_flat_tensor,
]


@pytest.mark.parametrize("shard", [False, True])
def test_steps_by_the_mean(comm, shard):
    """Steps equal those of one rank with all samples, also where backward and hand take turns."""
    for make in MAKERS:
        model, expected, other = mlp(), mlp(), mlp()
        optimizer = synchronous(comm, model, shard=shard)
        plain = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            data = batch(comm.rank, step)
            if shard or make is not into_the_same_tensor:
                optimizer.zero_grad()
            if step == 2 and make is not into_the_same_tensor:
                loss_of(model, data).backward()
            else:
                make(model, data, other)
            if make is of_another_model and step != 2:
                own = [q.grad.clone() for q in other.parameters()]
            optimizer.step()
            if make is of_another_model:
                assert all(map(torch.equal, own, [q.grad for q in other.parameters()]))
            plain.zero_grad()
            loss_of(expected, union(batch(rank, step) for rank in range(comm.size))).backward()
            plain.step()
        assert optimizer.statistics.rounds == 4, make.__name__
        optimizer.finish()
        assert_close(model, expected, 1e-11)
        assert_alike(comm, model)


@pytest.mark.parametrize("shard", [False, True])
def test_weights_no_sync_and_clipping(comm, shard):
    """`samples` weighs them; `no_sync` alone is reduced at the step; `clip_grad_norm_` clips the mean."""
    counts = [1 + rank for rank in range(comm.size)]
    for unsynced in (False, True):
        model, expected = mlp(), mlp()
        optimizer = synchronous(comm, model, shard=shard)
        plain = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            data = batch(comm.rank, step, counts[comm.rank])
            if unsynced:
                with optimizer.no_sync(), optimizer.samples(counts[comm.rank]):
                    loss_of(model, data).backward()
            else:
                with optimizer.samples(counts[comm.rank]):
                    by_autograd(model, data, None)
            if step == 1:
                norm = optimizer.clip_grad_norm_(0.05)
            elif step == 2:
                optimizer.reduce()
            optimizer.step()
            plain.zero_grad()
            loss_of(expected, union(batch(rank, step, counts[rank]) for rank in range(comm.size))).backward()
            if step == 1:
                wanted = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
                assert wanted > 0.05
                torch.testing.assert_close(norm, wanted, rtol=1e-9, atol=0)
            plain.step()
        assert optimizer.statistics.rounds == 3
        optimizer.finish()
        assert_close(model, expected, 1e-9)
        assert_alike(comm, model)


def test_what_the_user_changes_after_the_reduction_stays(comm):
    """Clipped, masked, unscaled or replaced: no second reduction. A kept gradient is not reduced a second time."""
    model = mlp()
    optimizer = synchronous(comm, model)
    parameters = list(model.parameters())

    def scale_in_place():
        for p in parameters:
            p.grad.mul_(1 + comm.rank)

    def replace():
        for p in parameters:
            p.grad = p.grad * (1 + comm.rank)

    def write_through_data():
        for p in parameters:
            p.grad.data.mul_(1 + comm.rank)

    for change in (scale_in_place, replace, write_through_data):
        for by_hand in (False, True):
            optimizer.zero_grad()
            if by_hand:
                by_autograd(model, batch(comm.rank, 0), None)
                optimizer.reduce()
            else:
                loss_of(model, batch(comm.rank, 0)).backward()
            change()
            kept = [p.grad.clone() for p in parameters]
            before = optimizer.statistics.rounds
            optimizer._reducer.reduce_missing("step")
            assert optimizer.statistics.rounds == before
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, kept, strict=True)), change.__name__
    # A gradient of a parameter that is unused from now on, kept since the last step, is not reduced again.
    optimizer.zero_grad()
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    rounds = optimizer.statistics.rounds
    model[4](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.statistics.rounds == rounds + 1
    # Zeros that zero_grad has left are no new gradients either.
    optimizer.zero_grad(set_to_none=False)
    model[4](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.statistics.rounds == rounds + 2
    abandon(optimizer)


@pytest.mark.parametrize("shard", [False, True])
def test_some_ranks_only(comm, shard):
    """A rank without gradients counts as zeros; ranks that took a backward meet those that set gradients."""
    model = mlp()
    optimizer = synchronous(comm, model, shard=shard)
    expected = mlp()
    plain = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    if comm.rank == 0:
        by_autograd(model, batch(0, 0), None)
    optimizer.step()
    by_autograd(expected, batch(0, 0), None)
    for q in expected.parameters():
        q.grad /= comm.size
    plain.step()
    optimizer.zero_grad()
    if not shard:  # with shard the step itself begins with a header, which names the ranks
        if comm.rank == 0:
            by_autograd(model, batch(0, 1), None)
        else:
            loss_of(model, batch(comm.rank, 1)).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(expected, union(batch(rank, 1) for rank in range(comm.size))).backward()
        plain.step()
    optimizer.finish()
    assert_close(model, expected, 1e-11)
    assert_alike(comm, model)


@pytest.mark.parametrize("then", ["backward", "finish", "shard"])
def test_a_second_gradient_on_one_rank_is_named(comm, then):
    """After a backward of all ranks one of them sets a gradient of an unused parameter: all raise, none hangs."""
    if comm.size == 1:
        return
    model = mlp()
    optimizer = synchronous(comm, model, shard=then == "shard")
    model[4](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    if comm.rank == 0:
        model[0].bias.grad = torch.ones(16, dtype=torch.float64)
    with pytest.raises(mpidl.MismatchError, match=r"rank 0: step or reduce, with the gradient of 0\.bias.*reduce\(\)"):
        optimizer.step()
        if then == "finish":
            optimizer.finish()
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, 0)).backward()
    abandon(optimizer)


def test_gradients_that_cannot_be_reduced(comm):
    """Found on one rank, raised on all, before anything is sent."""
    for kind in ("sparse", "expanded"):
        model = mlp()
        optimizer = synchronous(comm, model)
        if comm.rank == comm.size - 1:
            dense = torch.ones(16, 6, dtype=torch.float64)
            model[0].weight.grad = dense.to_sparse() if kind == "sparse" else dense[:1, :1].expand(16, 6)
        if kind == "sparse":
            with pytest.raises(mpidl.DtypeError, match=r"gradient of parameter 0\.weight is sparse"):
                optimizer.step()
            abandon(optimizer)
        else:
            optimizer.reduce()
            assert model[0].weight.grad.eq(1 / comm.size).all()
            optimizer.finish()


def test_a_hook_that_makes_a_gradient_sparse_on_one_rank(comm):
    """The other ranks, which wait for the reduction, are told."""
    model = mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=1e-5)
    if comm.rank == 0:
        handle = model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.to_sparse()))
    with pytest.raises(mpidl.DtypeError if comm.rank == 0 else mpidl.MismatchError, match=r"2\.weight has a sparse"):
        loss_of(model, batch(comm.rank, 0)).backward()
    if comm.rank == 0:
        handle.remove()
    optimizer.zero_grad()
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)


def test_half_types(comm):
    model = mlp(torch.bfloat16)
    optimizer = synchronous(comm, model)
    given = [torch.full_like(p, 1.0 + comm.rank) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), given, strict=True):
        p.grad = gradient
    optimizer.reduce()
    assert all(p.grad.eq((1 + comm.size) / 2).all() for p in model.parameters())
    assert all(gradient.eq(1.0 + comm.rank).all() for gradient in given)  # the program's own tensors
    optimizer.finish()
