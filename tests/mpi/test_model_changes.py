"""A model that changes under `mpidl.Synchronous`: followed, or refused by name on every rank."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize, prune
from training_helpers import abandon, assert_alike, batch, loss_of, mlp, union

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3)


def synchronous(comm, model, **options):
    return mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, **options)


def rows(model, count):
    """Prunes or grows the hidden layer to `count` units, by `p.data = ...`."""
    for p, dim in ((model[2].weight, 0), (model[2].bias, 0), (model[4].weight, 1)):
        whole = torch.cat([p.data, p.data, p.data], dim)
        p.data = whole.narrow(dim, 0, count).clone()
        p.grad = None


def cast(dtype):
    return lambda model: model.to(dtype)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def gradients_in_float32(model):
    model[2].weight.grad = None
    model[2].weight.grad_dtype = torch.float32


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


FOLLOWED = {
    "float32": cast(torch.float32),
    "bfloat16": cast(torch.bfloat16),
    "swapped": swapped,
    "pruned": lambda model: rows(model, 3),
    "grown": lambda model: rows(model, 19),
    "turned": lambda model: setattr(model[0].weight, "data", model[0].weight.data.t().clone().t()),
    "parametrized": lambda model: parametrize.register_parametrization(model[2], "weight", Doubled()),
    "masked": lambda model: prune.l1_unstructured(model[2], "weight", 0.5),
    "frozen": lambda model: model[0].requires_grad_(False),
    "of_another_gradient_dtype": gradients_in_float32,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(comm, name):
    """The mean gradient is that of one rank with all samples, in a step after the change, whatever was there before."""
    for kept in (False, True):
        model, expected = mlp(), mlp()
        optimizer = synchronous(comm, model)
        for one in (model, expected):
            loss_of(one, batch(0, 0)).backward()
            one.zero_grad(set_to_none=not kept)
        optimizer.step()
        for one in (model, expected):
            FOLLOWED[name](one)
        dtype = model[0].weight.dtype
        for step in (1, 2):
            optimizer.zero_grad(set_to_none=not kept)
            expected.zero_grad(set_to_none=not kept)
            loss_of(model, batch(comm.rank, step, dtype=dtype)).backward()
            loss_of(expected, union(batch(rank, step, dtype=dtype) for rank in range(comm.size))).backward()
            bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
            bound = 1e-6 if "gradient_dtype" in name else bound
            for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), key
                if p.grad is not None:
                    assert p.grad.dtype == q.grad.dtype
                    torch.testing.assert_close(p.grad, q.grad, rtol=bound, atol=bound, msg=lambda t, k=key: f"{k}: {t}")
        optimizer.finish()


@pytest.mark.parametrize("name", ["float32", "pruned", "of_another_gradient_dtype"])
def test_on_one_rank_only(comm, name):
    if comm.size == 1:
        return
    model = mlp()
    optimizer = synchronous(comm, model)
    if comm.rank == 1:
        FOLLOWED[name](model)
    with pytest.raises(
        mpidl.MismatchError, match=r"the model has changed: parameter [0-9]\.\w+ differs between ranks.*rank 1: "
    ):
        loss_of(model, batch(comm.rank, 0, dtype=model[0].weight.dtype)).backward()
    abandon(optimizer)


def replace(model, optimizer):
    model[2].weight = torch.nn.Parameter(model[2].weight.detach().clone())


def delete(model, optimizer):
    del model[2].bias
    model[2].bias = None


def append(model, optimizer):
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))


def add_group(model, optimizer):
    optimizer._inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]})


def cast_to_complex(model, optimizer):
    model[2].weight.data = model[2].weight.data.to(torch.complex128)


REFUSED = {
    "replaced": (replace, mpidl.ArgumentError, r"parameter 2\.weight has left the model"),
    "deleted": (delete, mpidl.ArgumentError, r"parameter 2\.bias has left the model"),
    "appended": (append, mpidl.ArgumentError, r"param_groups\[0\]\['params'\]\[6\] has been added"),
    "group": (add_group, mpidl.ArgumentError, r"param_groups\[1\]\['params'\]\[0\] has been added"),
    "complex": (cast_to_complex, mpidl.DtypeError, r"parameter 2\.weight, or its gradient, has been cast"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("shard", [False, True])
def test_what_is_refused(comm, name, shard):
    """On all ranks, also where one alone has changed its model; at backward, and at a step without one."""
    change, error, text = REFUSED[name]
    if shard and name in ("replaced", "deleted", "complex"):
        text = r"parameter 2\.\w+ has left"
        error = mpidl.ArgumentError
    for backward in (True, False):
        model = mlp()
        optimizer = synchronous(comm, model, shard=shard)
        parameters = list(model.parameters())
        if comm.rank == comm.size - 1:
            change(model, optimizer)
        with pytest.raises(error, match=text):
            if backward:
                parameters[0].sum().backward()
            optimizer.step()
        abandon(optimizer)


def test_a_parameter_that_is_thawed_on_one_rank(comm):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = synchronous(comm, model)
    if comm.rank == comm.size - 1:
        model[0].requires_grad_(True)
    with pytest.raises(mpidl.ArgumentError, match=r"parameter 0\.weight was frozen"):
        loss_of(model, batch(comm.rank, 0)).backward()
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    optimizer.finish()
    assert_alike(comm, model)


def test_parameters_taken_out_of_a_group(comm):
    """All ranks alike: followed. One alone: named."""
    for ranks in (range(comm.size), [comm.size - 1]):
        model = mlp()
        optimizer = synchronous(comm, model)
        if comm.rank in ranks:
            del optimizer.param_groups[0]["params"][0]
        if len(ranks) == comm.size:
            before = model[0].weight.detach().clone()
            loss_of(model, batch(comm.rank, 0)).backward()
            optimizer.step()
            assert torch.equal(before, model[0].weight)
            optimizer.finish()
            assert_alike(comm, model)
        else:
            with pytest.raises(mpidl.MismatchError, match="order of parameter group 0 differs between ranks"):
                loss_of(model, batch(comm.rank, 0)).backward()
            abandon(optimizer)


def test_the_dtype_of_a_sharded_gradient(comm):
    model = mlp()
    optimizer = synchronous(comm, model, shard=True)
    if comm.rank == 0:
        model[2].weight.grad_dtype = torch.float32
    with pytest.raises(mpidl.ArgumentError, match=r"parameter 2\.weight has got another shape, dtype.*shard=True"):
        # The graph saves no weights: torch keeps what a failed backward has not reached until the process exits.
        sum(p.sum() for p in model.parameters()).backward()
    abandon(optimizer)
