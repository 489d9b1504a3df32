"""The user's own hooks in a backward that ends with the mean: each has run before its gradient is read."""

from __future__ import annotations

import threading

import pytest
import torch
from training_helpers import assert_alike, assert_close, batch, loss_of, mlp, union

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3)
SMALL = 1e-5  # MiB: a bucket per parameter, so that each leaves while backward goes on


def synchronous(comm, model, **options):
    return mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, **options)


def in_place(p, factor):
    p.grad.mul_(factor)


def through_data(p, factor):
    p.grad.data.mul_(factor)


def replacing(p, factor):
    p.grad = p.grad * factor


def of_gradients(model, factor, change):
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: change(p, factor))


def of_tensors(model, factor, change):
    for p in model.parameters():
        p.register_hook(lambda gradient: gradient * factor)


def of_accumulation_nodes(model, factor, change):
    model.nodes = [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    for node, p in zip(model.nodes, model.parameters(), strict=True):
        node.register_hook(lambda *_, p=p: change(p, factor))


def of_modules(model, factor, change):
    """A layer's gradients are there when the hook of the layer before it runs."""
    done = set()

    def hook(module, *_):
        layer = next((i for i, one in enumerate(model) if one is module), None)
        for p in model[layer + 1].parameters() if layer is not None and layer not in done else ():
            change(p, factor)

    for i in (1, 3):
        model[i].register_full_backward_hook(hook)


def of_the_first_layer(model, factor, change):
    """One hook, at the very end, writes to all gradients: those of buckets that left long ago too."""
    count = []

    def hook(p):
        for q in model.parameters():
            if q is not p and change is not replacing:
                q.grad.mul_(factor)
        count.append(p)

    model[0].weight.register_post_accumulate_grad_hook(hook)


WAYS = [of_gradients, of_tensors, of_accumulation_nodes, of_modules, of_the_first_layer]


def expected_gradients(size, way, change, step):
    """The mean of what the ranks have after their hooks, on one rank."""
    total = None
    for rank in range(size):
        model = mlp()
        way(model, 2.0 + rank, change)
        loss_of(model, batch(rank, step)).backward()
        found = [p.grad / size for p in model.parameters()]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return total


@pytest.mark.parametrize("change", [in_place, through_data, replacing])
def test_hooks_that_were_registered_after_the_wrapper(comm, change):
    for way in WAYS:
        if way is of_the_first_layer and change is through_data:
            continue
        for cap in (SMALL, 25):
            model = mlp()
            optimizer = synchronous(comm, model, bucket_cap_mb=cap)
            way(model, 2.0 + comm.rank, change)
            for step in range(3):
                optimizer.zero_grad()
                loss_of(model, batch(comm.rank, step)).backward()
                for p, q in zip(model.parameters(), expected_gradients(comm.size, way, change, step), strict=True):
                    torch.testing.assert_close(p.grad, q, rtol=1e-12, atol=1e-15, msg=f"{way.__name__} {step} {cap}")
            optimizer.finish()


def test_hooks_with_shards(comm):
    for way in (of_gradients, of_modules, of_the_first_layer):
        models = []
        for shard in (False, True):
            model = mlp()
            optimizer = synchronous(comm, model, shard=shard, bucket_cap_mb=SMALL)
            way(model, 2.0 + comm.rank, in_place)
            for step in range(3):
                optimizer.zero_grad()
                loss_of(model, batch(comm.rank, step)).backward()
                optimizer.step()
            optimizer.finish()
            models.append(model)
        assert_close(*models, 1e-12)


def test_gradients_that_lie_in_one_tensor(comm):
    """Views of one tensor share a version counter, and one tensor may be the gradient of two parameters."""
    model, expected = mlp(), mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=SMALL)
    for one in (model, expected):
        flat = torch.zeros(sum(p.numel() for p in one.parameters()), dtype=torch.float64)
        at = 0
        for p in one.parameters():
            p.grad = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
    for step in range(3):
        loss_of(model, batch(comm.rank, step)).backward()
        loss_of(expected, union(batch(rank, step) for rank in range(comm.size))).backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
    optimizer.finish()
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    pair = torch.nn.ModuleList([a, b]).double()
    optimizer = synchronous(comm, pair, bucket_cap_mb=SMALL)
    a.weight.grad = b.weight.grad = torch.zeros(3, 3, dtype=torch.float64)
    (b(a(torch.ones(2, 3, dtype=torch.float64))) * (1 + comm.rank)).sum().backward()
    assert a.weight.grad is b.weight.grad
    found = comm.allgather(a.weight.grad)
    assert found.eq(found[0]).all()
    optimizer.finish()


def test_gradients_of_earlier_rounds_are_separate(comm):
    """Gradients that a round has left can be accumulated to, without each being taken for changed: one reduction."""
    model = mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=0.001)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch(comm.rank, 0)).backward()
        optimizer.step()
    assert not any(memory.patient for memory in optimizer._reducer._buckets.memories)
    optimizer.finish()


def test_a_hook_that_steps_by_itself(comm):
    """The optimizer-in-backward recipe takes each gradient away: no rank has used the parameter then."""
    model = mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=SMALL)
    for p in model[0].parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    loss_of(model, batch(comm.rank, 0)).backward()
    assert model[0].weight.grad is None and model[0].bias.grad is None and model[2].weight.grad is not None
    optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)


def test_a_hook_that_raises_on_one_rank(comm):
    model, expected = mlp(), mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=SMALL)
    if comm.rank == 0:

        def fail(p):
            raise MemoryError("on this rank only")

        handle = model[2].weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(MemoryError):
            loss_of(model, batch(0, 9)).backward()
        handle.remove()
        optimizer.zero_grad()
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    loss_of(expected, union(batch(rank, 0) for rank in range(comm.size))).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    optimizer.finish()
    assert_close(model, expected, 1e-11)


def test_another_thread_runs_the_model_during_backward(comm):
    """With gradients on, as a prefetching or an evaluating thread may."""
    model, expected = mlp(), mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=SMALL)
    failed = []

    def forward():
        try:
            loss_of(model, batch(comm.rank, 7))
        except BaseException as error:  # for the assertion below
            failed.append(error)

    def in_the_middle(gradient):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    def in_its_backward(module, inputs, output):
        if threading.current_thread() is threading.main_thread():
            output.register_hook(in_the_middle)

    model[1].register_forward_hook(in_its_backward)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
        expected.zero_grad()
        loss_of(expected, union(batch(rank, step) for rank in range(comm.size))).backward()
        torch.optim.SGD(expected.parameters(), lr=0.1).step()
    assert not failed
    optimizer.finish()
    assert_close(model, expected, 1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_under_a_late_hook(comm, reentrant):
    def run(model, data, checkpointed):
        x, y = data
        x = x.clone().requires_grad_()
        for layer in (model[0:2], model[2:4], model[4]):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        return ((x - y) ** 2).mean()

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, data):
            return run(self.inner, data, True)

    model = Checkpointed()
    optimizer = synchronous(comm, model, bucket_cap_mb=SMALL)
    of_gradients(model, 2.0 + comm.rank, in_place)
    for step in range(2):
        optimizer.zero_grad()
        model(batch(comm.rank, step)).backward()
        wanted = expected_gradients(comm.size, of_gradients, in_place, step)
        for p, q in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, q, rtol=1e-12, atol=1e-15)
    optimizer.finish()


def test_several_backwards_and_penalties_under_a_late_hook(comm):
    """retain_graph and two backwards add up; a penalty on the gradient of the input differentiates twice."""
    model = mlp()
    optimizer = synchronous(comm, model, bucket_cap_mb=SMALL)
    seen = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clamp_(-0.05, 0.05)) and None)

    def losses(one, rank):
        x, y = batch(rank, 0)
        x.requires_grad_()
        loss = ((one(x) - y) ** 2).mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss, (slope**2).sum()

    first, penalty = losses(model, comm.rank)
    first.backward(retain_graph=True)
    (first + penalty).backward()
    wanted = []
    for rank in range(comm.size):
        one = mlp()
        loss, extra = losses(one, rank)
        wanted.append((one, loss, extra))
    for one, loss, _ in wanted:
        for p, g in zip(
            one.parameters(), torch.autograd.grad(loss, [*one.parameters()], retain_graph=True), strict=True
        ):
            p.grad = g.clamp(-0.05, 0.05)
    mean = [
        sum(gs) / comm.size for gs in zip(*[[p.grad for p in one.parameters()] for one, _, _ in wanted], strict=True)
    ]
    total = [torch.zeros_like(g) for g in mean]
    for one, loss, extra in wanted:
        found = torch.autograd.grad(loss + extra, [*one.parameters()], allow_unused=True)
        for into, before, g in zip(total, mean, found, strict=True):
            into.add_((before + (0 if g is None else g)).clamp(-0.05, 0.05) / comm.size)
    for p, q in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, q, rtol=1e-11, atol=1e-14)
    optimizer.finish()
