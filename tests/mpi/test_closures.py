"""`step(closure)`: on every class the step of a loop without closures; LBFGS as one process with all data."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from family_helpers import KINDS
from training_helpers import assert_alike, assert_close, batch, loss_of, mlp, union

import mpidl

SIZES = (1, 3)
WITH_OTHERS = True

AVERAGING = {
    "Synchronous": mpidl.Synchronous,
    "Synchronous sharded": functools.partial(mpidl.Synchronous, shard=True),
    "ModelAveraging": functools.partial(mpidl.ModelAveraging, communication_window=2),
    "ModelAveraging warming up": functools.partial(mpidl.ModelAveraging, warmup_steps=2),
    "DiLoCo": functools.partial(mpidl.DiLoCo, communication_window=2),
}


def lbfgs(model, search=None, **more):
    settings = {"lr": 1.0 if search else 0.3, "max_iter": 6, "line_search_fn": search} | more
    return torch.optim.LBFGS(model.parameters(), **settings)


def closure_of(optimizer, model, data, calls, scale=lambda number: 1.0):
    """A closure on one rank's data; `scale` spoils the loss of some evaluations."""

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = loss_of(model, data) * scale(len(calls))
        loss.backward()
        return loss

    return closure


def weighed(optimizer, model, data, calls):
    """The same for ranks that have different numbers of samples."""

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        with optimizer.samples(len(data[0])):
            loss = loss_of(model, data)  # of an empty batch: NaN
            loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", AVERAGING)
def test_a_closure_takes_the_step_of_a_loop_without_one(comm, name):
    found = []
    for with_closure in (False, True):
        model = mlp()
        optimizer = AVERAGING[name](torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, comm=comm)
        for step in range(3):
            calls = []
            closure = closure_of(optimizer, model, batch(comm.rank, step), calls)
            if with_closure:
                with torch.no_grad():  # the closure needs gradients all the same
                    loss = optimizer.step(closure)
            else:
                loss = closure()
                assert optimizer.step() is None
            assert len(calls) == 1
            found.append(loss.item())
        optimizer.finish()
        found.append(model)
    assert found[:3] == found[4:7]
    assert_alike(comm, found[7])
    assert_close(found[7], found[3], 0.0)


@pytest.mark.parametrize("name", KINDS)
def test_a_closure_on_a_worker(comm, name):
    """A worker alone takes known steps; AEASGD must take the gradient before its exchange, as its paper does."""
    found = []
    for with_closure in (False, True):
        model = mlp()
        optimizer = KINDS[name](torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, communication_window=2)
        for step in range(5):
            closure = closure_of(optimizer, model, batch(0, step), [])
            loss = optimizer.step(closure) if with_closure else closure()
            if not with_closure:
                optimizer.step()
            found.append(loss.item())
        optimizer.finish()
        assert_alike(comm, model)
        found.append(model)
    if comm.size == 1:  # several free-running workers differ from run to run
        assert found[:5] == found[6:11]
        assert_close(found[11], found[5], 0.0)


def test_what_a_closure_may_return(comm):
    """An optimiser that evaluates once hands anything on; a closure without backward steps on what is there."""
    model = mlp()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    for returned in (None, 0.5, "text"):
        assert optimizer.step(lambda returned=returned: returned) is returned
    with pytest.raises(mpidl.ArgumentError, match=r"step\(Tensor\): expected a closure"):
        optimizer.step(torch.ones(()))
    optimizer.finish()
    assert_alike(comm, model)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("kind", ["even", "uneven", "one empty"])
def test_lbfgs_is_that_of_one_process_with_all_data(comm, search, kind):
    counts = {"even": [4, 4, 4], "uneven": [1, 7, 4], "one empty": [6, 0, 5]}[kind][: comm.size]
    batches = [batch(rank, 0, count) for rank, count in enumerate(counts)]
    alone, model = mlp(), mlp()
    reference, calls, expected = lbfgs(alone, search), [], []
    optimizer = mpidl.Synchronous(lbfgs(model, search), model, comm=comm)
    closure = (closure_of if kind == "even" else weighed)(optimizer, model, batches[comm.rank], calls)
    for _ in range(3):
        theirs = reference.step(closure_of(reference, alone, union(batches), expected))
        ours = optimizer.step(closure)
        assert abs(ours.item() - theirs.item()) <= 1e-12
        assert_alike(comm, model)
    assert len(calls) == len(expected)
    assert comm.allgather(torch.tensor([float(len(calls)), ours])).unique(dim=0).shape[0] == 1
    optimizer.finish()
    assert_close(model, alone, 1e-9)  # a direction divides by differences of gradients: rounding grows in it


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_with_a_nan_in_a_trial_step_of_one_rank(comm, search):
    """All ranks see the NaN, so all take the same way out of it."""
    model, calls = mlp(), []
    optimizer = mpidl.Synchronous(lbfgs(model, search), model, comm=comm)
    spoilt = lambda number: math.nan if number == 4 and comm.rank == comm.size - 1 else 1.0  # noqa: E731
    closure = closure_of(optimizer, model, batch(comm.rank, 0), calls, spoilt)
    for _ in range(2):
        optimizer.step(closure)
    counts = comm.allgather(torch.tensor([len(calls)]))
    assert counts.eq(counts[0]).all()
    bits = torch.cat([p.detach().flatten() for p in model.parameters()]).view(torch.int64)
    bits = comm.allgather(bits)
    assert bits.eq(bits[0]).all()
    optimizer.finish()


def test_lbfgs_goes_on_when_a_rank_has_finished(comm):
    """The others then take their mean, and every rank ends with their model and state, lists of tensors included."""
    model = mlp()
    inner = lbfgs(model, "strong_wolfe")
    optimizer = mpidl.Synchronous(inner, model, comm=comm)
    for _ in range(1 if comm.rank == comm.size - 1 else 3):
        optimizer.step(closure_of(optimizer, model, batch(comm.rank, 0), []))
    optimizer.finish()
    assert_alike(comm, model)
    state = inner.state[model[0].weight]
    assert len(state["old_dirs"]) > 1
    last = comm.allgather(torch.stack([state["old_dirs"][-1], state["d"]]))
    assert last.eq(last[0]).all()


def test_lbfgs_without_a_loss_is_refused_alike(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(lbfgs(model), model, comm=comm)

    def closure(returned):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, 0)).backward()
        return returned

    wrong, last = comm.rank == comm.size - 1, f"rank {comm.size - 1}: " if comm.size > 1 else ""
    for returned, text in ((None, "None"), (torch.ones(2), "something that is not one real number")):
        with pytest.raises(mpidl.ArgumentError, match=rf"the closure returned .*{last}{text}; return the loss"):
            optimizer.step(lambda returned=returned: closure(returned if wrong else torch.ones(())))
    optimizer.finish()


class Sharp(torch.optim.SGD):
    """Sharpness-aware minimisation, as users write it: the second gradient is taken elsewhere."""

    def step(self, closure):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=0.05)
        loss = torch.enable_grad()(closure)()
        with torch.no_grad():
            for p, old in zip(self.param_groups[0]["params"], before, strict=True):
                p.copy_(old)
        super().step()
        return loss


def test_an_optimizer_that_evaluates_in_the_middle(comm):
    """Every rank alike; where steps are local, parameters are weighed by the samples of the last evaluation."""
    alone, model = mlp(), mlp()
    reference, everything = Sharp(alone.parameters(), lr=0.1), union([batch(r, 0) for r in range(comm.size)])
    optimizer = mpidl.Synchronous(Sharp(model.parameters(), lr=0.1), model, comm=comm)
    for _ in range(2):
        ours = closure_of(optimizer, model, batch(comm.rank, 0), [])
        theirs = closure_of(reference, alone, everything, [])
        ours(), theirs()
        assert abs(optimizer.step(ours).item() - reference.step(theirs).item()) < 1e-14
    optimizer.finish()
    assert_close(model, alone)
    model = mlp()
    optimizer = mpidl.ModelAveraging(Sharp(model.parameters(), lr=0.1), model, comm=comm, communication_window=3)
    closure = weighed(optimizer, model, batch(comm.rank, 0, comm.rank + 1), [])
    closure()
    assert optimizer.step(closure) > 0
    assert optimizer._weight.state == [1, 1, comm.rank + 1]
    optimizer.finish()
    assert_alike(comm, model)


@pytest.mark.parametrize("name", ["AGN", "AEASGD", "ADAG", "ModelAveraging", "DiLoCo", "GEM"])
def test_lbfgs_is_refused_where_exchanges_move_the_parameters(comm, name):
    model = mlp()
    kind = getattr(mpidl, name)
    with pytest.raises(mpidl.ArgumentError, match=r"LBFGS[,;].*"):
        kind(lbfgs(model), model, comm=comm)
