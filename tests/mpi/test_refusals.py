"""What the distributed optimisers refuse: alike on every rank, before the first message, naming what is wrong."""

from __future__ import annotations

import pytest
import torch
from training_helpers import abandon, batch, loss_of, mlp

import mpidl

WITH_OTHERS = True
ANY_MPI = True

CLASSES = {
    "Synchronous": mpidl.Synchronous,
    "Downpour": mpidl.Downpour,
    "AGN": mpidl.AGN,
}


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


@pytest.mark.parametrize("name", CLASSES)
class TestEveryOptimizer:
    def test_a_parameter_that_is_not_the_models(self, comm, name):
        model, other = mlp(), mlp()
        optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
        with pytest.raises(mpidl.ArgumentError, match=r"6 parameter\(s\) that are not the model's.*\[6\]"):
            CLASSES[name](optimizer, model, comm=comm)

    def test_one_rank_alone_is_wrong(self, comm, name):
        model, other = mlp(), mlp()
        wrong = comm.rank == comm.size - 1
        optimizer = sgd(other if wrong else model)
        expected = mpidl.ArgumentError if wrong else mpidl.MismatchError
        with pytest.raises(expected) as caught:
            CLASSES[name](optimizer, model, comm=comm)
        if not wrong:
            assert f"rank {comm.size - 1}" in str(caught.value) and "not the model's" in str(caught.value)

    def test_models_that_differ(self, comm, name):
        if comm.size == 1:
            return
        width = 9 if comm.rank == 1 else 8
        model = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Linear(width, 1))
        with pytest.raises(mpidl.MismatchError, match=r"parameter 0\.weight differs.*\[8, 6\].*rank 1: \[\[9, 6\]"):
            CLASSES[name](sgd(model), model, comm=comm)

    def test_not_an_optimizer_or_wrapped_twice(self, comm, name):
        model = mlp()
        with pytest.raises(mpidl.ArgumentError, match=r"list; expected a torch\.optim\.Optimizer"):
            CLASSES[name]([1], model, comm=comm)
        optimizer = CLASSES[name](sgd(model), model, comm=comm)
        with pytest.raises(mpidl.ArgumentError, match="wrap it once"):
            CLASSES[name](optimizer, model, comm=comm)
        optimizer.finish()

    def test_sparse_and_integer_and_complex(self, comm, name):
        model = torch.nn.Sequential(torch.nn.Embedding(4, 2, sparse=True))
        with pytest.raises(mpidl.DtypeError, match="module 0 gives sparse gradients"):
            CLASSES[name](sgd(model), model, comm=comm)
        model = torch.nn.Linear(2, 2, dtype=torch.complex64)
        with pytest.raises(mpidl.DtypeError, match=r"parameter weight is torch\.complex64"):
            CLASSES[name](sgd(model), model, comm=comm)

    def test_not_a_model_on_one_rank_or_not_our_communicator(self, comm, name):
        model = mlp()
        wrong = comm.rank == comm.size - 1
        expected = mpidl.ArgumentError if wrong else mpidl.MismatchError
        with pytest.raises(expected, match="model is a dict; expected a torch"):
            CLASSES[name](sgd(model), {"net": model} if wrong else model, comm=comm)
        with pytest.raises(mpidl.DtypeError, match=r"comm is a int; expected an mpidl\.Communicator"):
            CLASSES[name](sgd(model), model, comm=comm.size)

    def test_parameters_that_thaw_after_the_constructor(self, comm, name):
        """Trained on every rank by itself, they would drift apart without a word."""
        if name == "Synchronous":
            return  # whose backward refuses it, on every rank: test_model_changes
        model = mlp()
        model[0].requires_grad_(False)
        optimizer = CLASSES[name](sgd(model), model, comm=comm)
        model[0].requires_grad_(True)
        loss_of(model, batch(comm.rank, 0)).backward()
        with pytest.raises(mpidl.ArgumentError, match=r"2 parameter\(s\) were frozen.*0\.weight, 0\.bias"):
            optimizer.step()
        model[0].requires_grad_(False)
        model[0].zero_grad()  # a gradient of this rank alone, with which the step would make the ranks drift apart
        optimizer.step()
        optimizer.finish()

    def test_nothing_to_train(self, comm, name):
        model = mlp().requires_grad_(False)
        with pytest.raises(mpidl.ArgumentError, match="nothing to train"):
            CLASSES[name](sgd(model), model, comm=comm)

    def test_closure_groups_pickle_and_use_after_finish(self, comm, name):
        model = mlp()
        optimizer = CLASSES[name](sgd(model), model, comm=comm)
        with pytest.raises(mpidl.ArgumentError, match="expected a closure"):
            optimizer.step(torch.zeros(()))
        with pytest.raises(mpidl.ArgumentError, match="add_param_group"):
            optimizer.add_param_group({"params": []})
        with pytest.raises(TypeError, match="state_dict"):
            optimizer.__getstate__()
        optimizer.finish()
        optimizer.finish()
        with pytest.raises(mpidl.ClosedError, match="finish"):
            optimizer.step()

    def test_unknown_buffers_mode(self, comm, name):
        model = mlp()
        with pytest.raises(mpidl.ArgumentError, match="buffers='sum'; expected one of mean, local"):
            CLASSES[name](sgd(model), model, comm=comm, buffers="sum")


def test_hyperparameters_must_agree_where_all_take_the_same_step(comm):
    model = mlp()
    optimizer = sgd(model, lr=0.1 * (comm.rank + 1))
    if comm.size > 1:
        with pytest.raises(mpidl.MismatchError, match="lr of parameter group 0 differs"):
            mpidl.Synchronous(optimizer, model, comm=comm)
    mpidl.Downpour(optimizer, model, comm=comm).finish()  # workers may differ
    layers = [{"params": list(model[i].parameters()), "lr": 0.1 * (i + 1)} for i in (0, 2, 4)]
    if comm.rank:
        layers[0]["params"], layers[2]["params"] = layers[2]["params"], layers[0]["params"]
    if comm.size > 1:
        with pytest.raises(mpidl.MismatchError, match=r"parameter group 0 differs.*0\.weight.*4\.weight"):
            mpidl.Synchronous(torch.optim.SGD(layers), model, comm=comm)


def test_optimizer_state_that_cannot_travel(comm):
    model = mlp()
    optimizer = sgd(model)
    if comm.rank == 0:
        optimizer.state[model[0].weight]["history"] = [object()]
    expected = mpidl.DtypeError if comm.rank == 0 else mpidl.MismatchError
    with pytest.raises(expected, match="history"):
        mpidl.Synchronous(optimizer, model, comm=comm)


def test_sparse_gradient_of_an_unknown_module(comm):
    class Lookup(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(4, 2))

        def forward(self, rows):
            return torch.nn.functional.embedding(rows, self.table, sparse=True)

    model = Lookup()
    with mpidl.Synchronous(sgd(model), model, comm=comm), pytest.raises(mpidl.DtypeError, match=r"table.*sparse"):
        model(torch.tensor([1])).sum().backward()


def test_samples_on_some_ranks_only_or_nowhere(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(sgd(model), model, comm=comm)
    with pytest.raises(mpidl.ArgumentError, match=r"samples\(-1\)"), optimizer.samples(-1):
        pass
    with pytest.raises(mpidl.ArgumentError, match="all ranks gave 0 samples"), optimizer.samples(0):
        loss_of(model, batch(comm.rank, 0)).backward()
    abandon(optimizer)
    other = mlp()
    second = mpidl.Synchronous(sgd(other), other, comm=comm)
    if comm.size > 1:
        with pytest.raises(mpidl.ArgumentError, match="weights differ in kind: rank 0: samples"):
            if comm.rank == 0:
                with second.samples(4):
                    loss_of(other, batch(comm.rank, 0)).backward()
            else:
                loss_of(other, batch(comm.rank, 0)).backward()
        with pytest.raises(mpidl.ClosedError, match="ended with an error"):
            second.step()
    abandon(second)


def test_ranks_that_have_come_apart(comm):
    """One rank steps twice on one gradient: the next backward says so on every rank instead of diverging silently."""
    if comm.size == 1:
        return
    model = mlp()
    optimizer = mpidl.Synchronous(sgd(model), model, comm=comm)
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    with pytest.raises(mpidl.MismatchError, match=r"come apart.*rank 1: step or reduce without a new gradient"):
        if comm.rank == 1:
            optimizer.step()
        loss_of(model, batch(comm.rank, 1)).backward()
    abandon(optimizer)


@pytest.mark.parametrize("window", [0, -1, 2.5, "5"])
def test_communication_window(comm, window):
    model = mlp()
    with pytest.raises(mpidl.ArgumentError, match="communication_window"):
        mpidl.AGN(sgd(model), model, communication_window=window, comm=comm)


def test_bucket_cap(comm):
    model = mlp()
    for cap in (0, float("nan"), float("inf"), "25"):
        with pytest.raises(mpidl.ArgumentError, match=f"bucket_cap_mb={cap!r}"):
            mpidl.Synchronous(sgd(model), model, bucket_cap_mb=cap, comm=comm)
