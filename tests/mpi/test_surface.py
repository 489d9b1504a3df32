"""One surface on all classes, and what users hand in: lists of modules, group values of any type, compiled models."""

from __future__ import annotations

import collections
import functools
import math

import numpy as np
import pytest
import torch
from family_helpers import KINDS
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_helpers import FEATURES, assert_alike, assert_close, batch, loss_of, mlp, union

import mpidl

SIZES = (1, 3)
WITH_OTHERS = True
EVERY = KINDS | {
    "Synchronous": mpidl.Synchronous,
    "Synchronous sharded": functools.partial(mpidl.Synchronous, shard=True),
    "ModelAveraging": functools.partial(mpidl.ModelAveraging, communication_window=2),
    "DiLoCo": functools.partial(mpidl.DiLoCo, communication_window=2),
}


def sgd(parameters, lr=0.01, **more):
    return torch.optim.SGD(parameters, lr=lr, **more)


@pytest.mark.parametrize("name", EVERY)
def test_changing_the_algorithm_is_changing_one_name(comm, name):
    """The whole surface in one loop; the last rank has no samples in one step, and a NaN for its gradient."""
    model = mlp()
    with EVERY[name](sgd(model.parameters()), model, comm=comm) as optimizer:
        for step in range(4):
            optimizer.zero_grad()
            empty = step == 1 and comm.rank == comm.size - 1 and comm.size > 1
            count = 0 if empty else 4
            with optimizer.samples(count), optimizer.no_sync():
                (loss_of(model, batch(comm.rank, step)) * (math.nan if empty else 1.0)).backward()
            with optimizer.samples(count):
                loss = loss_of(model, batch(comm.rank, step)) * (math.nan if empty else 1.0)
                loss.backward()
            assert optimizer.clip_grad_norm_(1.0).numel() == 1
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[0].weight, mlp()[0].weight)
    assert_alike(comm, model)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"Synchronous", "Synchronous sharded"}))
def test_a_step_without_samples_moves_nothing_and_leaves_no_gradient(comm, name):
    model = mlp()
    optimizer = EVERY[name](sgd(model.parameters(), lr=0.1), model, comm=comm)
    before = [p.detach().clone() for p in model.parameters()]
    for inside in (False, True):
        with optimizer.samples(0):
            (loss_of(model, batch(comm.rank, 0)) * math.nan).backward()
            if inside:
                optimizer.step()
        if not inside:
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
    with pytest.raises(mpidl.ArgumentError, match=r"samples\(-1\)"), optimizer.samples(-1):
        pass
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.finish()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("warmup", [0, 2])
def test_model_averaging_weighs_by_samples(comm, warmup):
    """With one step per round this is SGD on all samples, whether gradients or parameters are averaged."""
    counts = [1, 4, 0][: comm.size]
    alone, model = mlp(), mlp()
    reference = sgd(alone.parameters(), lr=0.1)
    kind = functools.partial(mpidl.ModelAveraging, communication_window=1, warmup_steps=warmup)
    optimizer = kind(sgd(model.parameters(), lr=0.1), model, comm=comm)
    for step in range(3):
        batches = [batch(rank, step, count) for rank, count in enumerate(counts)]
        optimizer.zero_grad(), reference.zero_grad()
        with optimizer.samples(counts[comm.rank]):
            loss_of(model, batches[comm.rank]).backward()
        loss_of(alone, union(batches)).backward()
        optimizer.step(), reference.step()
    optimizer.finish()
    assert_alike(comm, model)
    assert_close(model, alone)


def test_samples_on_some_ranks_only_are_refused_alike(comm):
    model = mlp()
    optimizer = mpidl.ModelAveraging(sgd(model.parameters()), model, comm=comm, communication_window=2)
    with optimizer.samples(4):
        loss_of(model, batch(comm.rank, 0)).backward()
    optimizer.step()
    if comm.rank == 0:
        with pytest.raises(
            mpidl.ArgumentError, match=r"rank.? 0: samples\(k\) in some" if comm.size > 1 else "in some"
        ):
            optimizer.step()
    else:
        with pytest.raises(mpidl.ArgumentError, match=r"samples\(k\) in some"), optimizer.samples(4):
            optimizer.step()
    optimizer._weight.state = [1, 0, 0]  # so that the optimiser can end
    optimizer.finish()


def test_the_state_of_pieces_is_not_assigned(comm):
    model = mlp()
    optimizer = mpidl.Synchronous(sgd(model.parameters(), momentum=0.9), model, comm=comm, shard=True)
    optimizer.state = collections.defaultdict(dict)  # a new start
    with pytest.raises(mpidl.ArgumentError, match=r"pieces of parameters; use load_state_dict"):
        optimizer.state = {model[0].weight: {"momentum_buffer": torch.ones(1)}}
    optimizer.finish()


# ------------------------------------------------------------------------------------- several modules, other modules


@pytest.mark.parametrize("name", EVERY)
def test_several_modules_and_loose_parameters(comm, name):
    torch.manual_seed(comm.rank)
    encoder, decoder = torch.nn.Linear(FEATURES, 4).double(), torch.nn.Linear(4, 1).double()
    scale = torch.nn.Parameter(torch.full((), 2.0 + comm.rank, dtype=torch.float64))
    hooks = len(encoder._forward_hooks)
    optimizer = EVERY[name](
        sgd([*encoder.parameters(), *decoder.parameters(), scale]), [encoder, decoder, scale], comm=comm
    )
    assert scale.item() == 2.0  # rank 0's
    for step in range(3):
        x, y = batch(comm.rank, step)
        optimizer.zero_grad()
        ((decoder(encoder(x).tanh()) * scale - y) ** 2).mean().backward()
        optimizer.step()
    if name == "Synchronous sharded":
        before = decoder.bias.item()
        with mpidl.exclusive([decoder]) as mine, torch.no_grad():  # a part of the models
            if mine:
                decoder.bias.add_(1.0)
        assert decoder.bias.item() == before + 1.0
    optimizer.finish()
    assert scale.item() != 2.0
    assert_alike(comm, torch.nn.ModuleList([encoder, decoder]))
    assert comm.allgather(scale.detach().reshape(1)).eq(scale).all()
    assert len(encoder._forward_hooks) == hooks
    assert [n for n, _ in encoder.named_parameters()] == ["weight", "bias"]


def test_the_list_names_its_parameters_and_refuses_others(comm):
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.complex64)
    optimizer = sgd([*a.parameters(), *b.parameters()])
    with pytest.raises(mpidl.DtypeError, match=r"parameter 1\.weight is torch\.complex64; expected a real"):
        mpidl.AGN(optimizer, [a, b], comm=comm)
    for wrong, text in (([a, 3], r"model\[1\] is a int"), ([], "empty list"), (a.weight, "a list of modules")):
        with pytest.raises(mpidl.ArgumentError, match=text):
            mpidl.Synchronous(sgd(a.parameters()), wrong, comm=comm)
    with pytest.raises(mpidl.ArgumentError, match="not the model's"):
        mpidl.Synchronous(optimizer, [a], comm=comm)


def test_a_script_module_and_a_compiled_one(comm):
    """torch.compile(fullgraph=True) fails at code that it cannot trace: a hook of ours must not be such code."""
    # The compiler's import takes seconds on every rank, so only one rank compiles.
    for kind in ("script", "compiled", "compiled later") if comm.size == 1 else ("script",):
        model, alone = mlp(), mlp()
        used = {"script": torch.jit.script, "compiled": compiled}.get(kind, lambda m: m)(model)
        optimizer = mpidl.Synchronous(sgd(used.parameters()), used, comm=comm)
        used = compiled(model) if kind == "compiled later" else used
        for step in range(2):
            optimizer.zero_grad()
            loss_of(used, batch(comm.rank, step)).backward()
            alone.zero_grad()
            loss_of(alone, union(batch(r, step) for r in range(comm.size))).backward()
            assert_close(
                torch.nn.ParameterList(p.grad for p in model.parameters()),
                torch.nn.ParameterList(p.grad for p in alone.parameters()),
            )
        optimizer.finish()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def test_sparse_embeddings_that_are_not_trained(comm):
    for held in (True, False):
        model = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 3, sparse=True), "head": torch.nn.Linear(3, 1)})
        if held:
            model["table"].requires_grad_(False)
        optimizer = mpidl.Synchronous(sgd((model if held else model["head"]).parameters()), model, comm=comm)
        model["head"](model["table"](torch.tensor([1, comm.rank]))).sum().backward()
        optimizer.step()
        optimizer.finish()
        assert_alike(comm, model)


# --------------------------------------------------------------------------------------------- group values and torch


class Own:
    """A user's object: its repr has an address, which differs between processes."""


def test_group_values_of_any_type(comm):
    model = mlp()
    values = {
        "np32": np.float32(0.25), "count": np.int64(3), "flag": np.bool_(True), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), "function": math.sqrt, "own": Own(), "made": lambda x: x, "nan": math.nan,
        "pair": (1, np.float64(2.0)), "nested": {"a": [1, 2], "t": torch.arange(3)}, "class": Own, "none": None,
    }  # fmt: skip
    inner = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01, dtype=torch.float64), capturable=False)
    inner.param_groups[0].update(values)
    optimizer = mpidl.Synchronous(inner, model, comm=comm)
    lr = inner.param_groups[0]["lr"]
    for step in range(1 if comm.rank else 3):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
        lr.mul_(0.5)
        inner.param_groups[0]["np32"] = np.float32(0.25 / (step + 2))
    optimizer.finish()
    group = inner.param_groups[0]
    assert group["lr"] is lr
    assert lr.item() == 0.01 / 8  # rank 0's, which took all steps
    assert group["np32"] == np.float32(0.0625)
    assert type(group["np32"]) is np.float32
    assert group["own"] is values["own"]
    assert group["pair"] == (1, 2.0)
    assert group["nested"]["t"].tolist() == [0, 1, 2]
    assert group["dtype"] is torch.bfloat16


def test_group_values_that_differ_are_named(comm):
    differing = {
        "lr": torch.tensor(0.1 + 1e-6 * comm.rank),  # printed alike
        "window": np.int64(comm.rank),
        "dtype": (torch.float32, torch.bfloat16, torch.float16)[comm.rank],
        "rule": (math.sqrt, math.exp, math.sin)[comm.rank],
    }
    for key, value in differing.items():
        model = mlp()
        inner = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
        inner.param_groups[1][key] = value
        if comm.size > 1:
            with pytest.raises(mpidl.MismatchError, match=f"{key} of parameter group 1 differs between ranks"):
                mpidl.Synchronous(inner, model, comm=comm)


@pytest.mark.parametrize("name", ["Synchronous", "AGN", "ModelAveraging"])
def test_what_torch_does_with_an_optimizer(comm, name):
    """Assignments, schedulers, hooks and averaged models do what they do with a plain optimiser."""

    def wrap(inner, model):
        return EVERY[name](inner, model, comm=comm, **({} if name == "Synchronous" else {"communication_window": 1}))

    ours, theirs = _program(wrap), _program(lambda inner, model: inner)
    assert ours[:2] == theirs[:2]
    for place in (2, 3) if name != "AGN" or comm.size == 1 else ():  # free-running workers differ from run to run
        assert_close(ours[place], theirs[place])


def _program(wrap):
    """Trains, with all that torch offers around an optimiser; returns what came of it."""
    model, seen, rates, schedulers = mlp(), [], [], torch.optim.lr_scheduler
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = wrap(inner, model)
    one = schedulers.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    parts = [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.StepLR(optimizer, 1)]
    sequential = schedulers.SequentialLR(optimizer, parts, milestones=[2])
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("all"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, batch(0, step)).backward()
        optimizer.step()
        (one if step < 3 else sequential).step()
        averaged.update_parameters(model)
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        if step == 1:
            optimizer.state = collections.defaultdict(dict)
            optimizer.param_groups = [dict(optimizer.param_groups[0])]
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05).step()
    rates.append(optimizer.param_groups[0]["lr"])
    handle.remove()
    if optimizer is not inner:
        with pytest.raises(mpidl.ArgumentError, match="regroup the same"):
            optimizer.param_groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]
        optimizer.finish()
    return rates, seen, model, averaged
