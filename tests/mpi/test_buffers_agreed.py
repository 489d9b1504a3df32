"""All of a model's state is agreed on in `finish()`: buffers, untrained parameters, optimisers with two modes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from family_helpers import KINDS
from training_helpers import assert_alike, batch, loss_of, mlp

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (3,)
APART = KINDS | {"ModelAveraging": mpidl.ModelAveraging, "DiLoCo": mpidl.DiLoCo}
ALL = APART | {"Synchronous": mpidl.Synchronous, "shard": partial(mpidl.Synchronous, shard=True)}
ANY_OPTIMIZER = ("Synchronous", "ModelAveraging", "DiLoCo", "Downpour", "AGN", "DynSGD", "ADAG", "AEASGD")


def sgd(model, lr=0.01):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(comm, model, optimizer, steps):
    for number in range(steps):
        step(model, optimizer, loss_of(model, batch(comm.rank, number)))


def everyone(comm, tensor):
    return comm.allgather(tensor.detach().clone().contiguous())


# ------------------------------------------------------------------------------------------- buffers that differ


def grow(model, rank):
    model.register_buffer("cos", torch.ones(8 + 8 * rank), persistent=model.persistent)


def only_here(model, rank):
    if rank:
        model.register_buffer("cos", torch.full((5,), 7.0), persistent=model.persistent)
    else:
        del model.cos


def cast(model, rank):
    model.cos = model.cos.double() if rank else model.cos + 1


@pytest.mark.parametrize("change", [grow, only_here, cast])
@pytest.mark.parametrize("name", ALL)
def test_a_buffer_of_another_shape_or_dtype_is_refused_and_a_cache_is_kept(comm, name, change):
    for persistent in (True, False) if comm.size > 1 else ():
        model = mlp()
        model.persistent = persistent
        model.register_buffer("cos", torch.arange(8.0), persistent=persistent)
        model.register_buffer("last", torch.zeros(4))
        optimizer = ALL[name](sgd(model), model, comm=comm)
        train(comm, model, optimizer, 1)
        change(model, comm.rank)
        model.last.fill_(comm.rank)
        mine = None if change is only_here and not comm.rank else model.cos.clone()
        if persistent:
            with pytest.raises(
                mpidl.MismatchError, match=r"finish: buffer cos differs between ranks.*persistent=False"
            ):
                optimizer.finish()
            optimizer.finish()
        else:
            optimizer.finish()
            assert (model.last == (comm.size - 1) / 2).all()
        if mine is not None:
            assert torch.equal(model.cos, mine)
        assert_alike(comm, model)


def test_a_cache_that_differs_before_the_optimizer_is_made_is_kept(comm):
    model = mlp()
    model.register_buffer("cos", torch.ones(8 + comm.rank), persistent=False)
    model.register_buffer("mask", torch.full((3,), float(comm.rank)), persistent=False)
    optimizer = mpidl.AGN(sgd(model), model, comm=comm)
    assert len(model.cos) == 8 + comm.rank and (model.mask == 0).all()
    model.mask.fill_(comm.rank)
    optimizer.finish()
    assert len(model.cos) == 8 + comm.rank and (model.mask == comm.rank).all()


# ------------------------------------------------------------------------------------------ buffers of every kind


def kinds_of(rank):
    """Buffers whose mean over ranks 0, 1 and 2 is what rank 1 has, by name."""
    return {
        "expanded": torch.full((1, 3), float(rank)).expand(4, 3),
        "windows": (torch.arange(6.0) + rank).unfold(0, 3, 1),
        "strided": (torch.arange(12.0) + rank).reshape(3, 4).T,
        "gaps": (torch.arange(12.0) + rank)[::3],
        "eight": torch.full((4,), 0.5 * rank).to(torch.float8_e4m3fn),
        "brief": torch.full((4,), 1.0 * rank, dtype=torch.bfloat16),
        "complex": torch.full((2,), complex(rank, -rank)),
        "conjugate": torch.full((2,), complex(rank, -rank)).conj(),
        "number": torch.tensor(float(rank)),
        "empty": torch.empty(0, 3),
        "count": torch.tensor(rank),
        "flags": torch.arange(3) < rank,
        "short": torch.arange(3, dtype=torch.int16) + rank,
    }


@pytest.mark.parametrize("name", ["Synchronous", "AGN", "ModelAveraging"])
def test_buffers_of_every_kind(comm, name):
    model = mlp()
    for key, buffer in kinds_of(comm.rank).items():
        model.register_buffer(key, buffer)
    optimizer = ALL[name](sgd(model), model, comm=comm)
    for key, buffer in kinds_of(0).items():
        assert torch.equal(getattr(model, key).to(buffer.dtype), buffer), key
    train(comm, model, optimizer, 2)
    for key, buffer in kinds_of(comm.rank).items():
        model.register_buffer(key, buffer)
    optimizer.finish()
    optimizer.verify()
    middle = kinds_of((comm.size - 1) // 2)  # the mean of 0, 1, 2, or of 0
    for key, buffer in middle.items():
        found = getattr(model, key)
        if buffer.is_floating_point() or buffer.is_complex():
            assert torch.equal(found, buffer), key
        else:
            assert torch.equal(found, kinds_of(0)[key]), key


def test_sparse_buffers_are_compared(comm):
    def graph(weight=1.0):
        return (torch.eye(3) * weight).to_sparse()

    for name in ("Synchronous", "DynSGD"):
        model = mlp()
        model.register_buffer("graph", graph())
        model.register_buffer("rows", graph().to_sparse_csr())
        optimizer = ALL[name](sgd(model), model, comm=comm)
        train(comm, model, optimizer, 1)
        optimizer.finish()
        assert torch.equal(model.graph.to_dense(), torch.eye(3))
    if comm.size == 1:
        return
    model.graph = graph(1.0 + comm.rank)
    with pytest.raises(mpidl.MismatchError, match="buffer graph is sparse and differs between ranks"):
        mpidl.Synchronous(sgd(model), model, comm=comm)
    model.graph = graph()
    optimizer = mpidl.DynSGD(sgd(model), model, comm=comm)
    model.graph = graph(1.0 + comm.rank)
    with pytest.raises(mpidl.MismatchError, match="finish: buffer graph is sparse and differs between ranks"):
        optimizer.finish()


def test_a_buffer_that_cannot_be_sent_is_named(comm):
    for buffer, what in (
        (torch.empty(3, device="meta"), "on device meta"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
    ):
        model = mlp()
        model.register_buffer("odd", buffer)
        with pytest.raises(mpidl.DtypeError, match=f"buffer odd is {what}"):
            mpidl.AGN(sgd(model), model, comm=comm)


# -------------------------------------------------------------------------------------------- who weighs how much


@pytest.mark.parametrize("name", APART)
def test_statistics_weigh_each_worker_by_the_batches_that_it_has_seen(comm, name):
    model = torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.BatchNorm1d(2, momentum=None)).double()
    model[1].num_batches_tracked.fill_(7)  # of an earlier training
    model.register_buffer("seen", torch.zeros(1))
    model.register_buffer("label", torch.tensor(0))
    optimizer = APART[name](sgd(model), model, comm=comm)
    model[1].momentum = 1.0
    for _ in range(comm.rank):  # rank 0 has no data
        step(model, optimizer, model(torch.randn(4, 6).double()).sum())
    model[1].running_mean.fill_(float(comm.rank))
    model[1].running_var.fill_(float("nan") if comm.rank == 0 and comm.size > 1 else 1.0)
    model.seen.fill_(float(comm.rank))
    model.label.fill_(10 * comm.rank)
    optimizer.finish()
    if comm.size == 1:
        assert model[1].running_mean.eq(0).all() and model[1].num_batches_tracked == 7
        return
    assert torch.allclose(model[1].running_mean, torch.tensor(5 / 3).double())  # (1 * 1 + 2 * 2) / 3
    assert model[1].running_var.eq(1).all()
    assert torch.allclose(model.seen, torch.tensor(5 / 3))
    assert model[1].num_batches_tracked == 7 + 1 + 2
    assert model.label == 20  # of the rank that took most steps


def test_statistics_of_equal_workers_are_their_mean_and_a_reset_counts_anew(comm):
    model = torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.BatchNorm1d(2)).double()
    model[1].num_batches_tracked.fill_(7)
    optimizer = mpidl.ModelAveraging(sgd(model), model, comm=comm)
    model[1].reset_running_stats()
    for _ in range(2):
        step(model, optimizer, model(torch.randn(4, 6).double()).sum())
    model[1].running_mean.fill_(float(comm.rank))
    optimizer.finish()
    assert model[1].running_mean.eq((comm.size - 1) / 2).all()
    assert model[1].num_batches_tracked == 2 * comm.size


# --------------------------------------------------------------------------------------------- untrained parameters


@pytest.mark.parametrize("name", ALL)
def test_a_teacher_is_alike_on_all_ranks(comm, name):
    several = name in ("Synchronous", "AGN", "ModelAveraging")
    for buffers, held in (("mean", False), ("mean", True), ("local", True))[: 3 if several else 1]:
        student, teacher = mlp(), mlp().requires_grad_(False)
        model = torch.nn.ModuleDict({"student": student, "teacher": teacher})
        parameters = [p for p in model.parameters() if held or p.requires_grad]
        optimizer = ALL[name](torch.optim.SGD(parameters, lr=0.01), model, comm=comm, buffers=buffers)
        for number in range(3):
            step(model, optimizer, loss_of(student, batch(comm.rank, number)))
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    old.lerp_(new, 0.5)
        before = everyone(comm, teacher[0].weight)
        optimizer.finish()
        assert_alike(comm, student)
        if buffers == "mean":
            assert_alike(comm, teacher)
            assert torch.allclose(teacher[0].weight, before.mean(0), rtol=1e-12)
            optimizer.verify()
        else:
            assert torch.equal(teacher[0].weight, before[comm.rank])


@pytest.mark.parametrize("name", ["Synchronous", "shard"])
def test_a_frozen_parameter_loaded_on_one_rank_is_named(comm, name):
    for buffers in ("mean", "local") if comm.size > 1 else ():
        model = torch.nn.ModuleDict({"head": mlp(), "body": mlp().requires_grad_(False)})
        optimizer = ALL[name](sgd(model), model, comm=comm, buffers=buffers)
        step(model, optimizer, loss_of(model["head"], batch(comm.rank, 0)))
        with torch.no_grad():
            model["body"][0].bias.add_(comm.rank == 0)
        if buffers == "mean":
            with pytest.raises(mpidl.MismatchError, match=r"parameter body\.0\.bias differs.*rank 0 by up to 1"):
                optimizer.finish()
        else:
            optimizer.finish()


def test_what_another_optimizer_still_trains_is_left_alone(comm):
    model = torch.nn.ModuleDict({"first": mlp(), "second": mlp()})
    one = mpidl.AGN(sgd(model["first"]), model, comm=comm, communication_window=100)
    two = mpidl.AGN(sgd(model["second"]), model, comm=comm, communication_window=100)
    for number in range(3):
        step(model, one, loss_of(model["first"], batch(comm.rank, number)))
        step(model, two, loss_of(model["second"], batch(comm.rank, number)))
    before = copy.deepcopy(model["second"].state_dict())
    one.finish()
    assert_alike(comm, model["first"])
    assert all(torch.equal(value, before[key]) for key, value in model["second"].state_dict().items())
    two.finish()
    assert_alike(comm, model)


# ---------------------------------------------------------------------------------------------- gradients of zeros


def test_warm_up_gives_unused_parameters_no_gradient(comm):
    model = torch.nn.ModuleDict({"all": mlp(), "some": mlp(), "none": mlp()})
    optimizer = mpidl.ModelAveraging(
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5), model, comm=comm, warmup_steps=3
    )
    before = copy.deepcopy(model["none"].state_dict())
    for number in range(3):
        optimizer.zero_grad()
        loss_of(model["all"], batch(comm.rank, number)).backward()
        if comm.rank == comm.size - 1:
            loss_of(model["some"], batch(0, number)).backward()
            mine = model["some"][0].weight.grad.clone()
        optimizer.step()
        assert all(p.grad is None for p in model["none"].parameters())
        if comm.rank == comm.size - 1:
            assert torch.allclose(model["some"][0].weight.grad, mine / comm.size)
    assert_alike(comm, model)
    assert all(torch.equal(value, before[key]) for key, value in model["none"].state_dict().items())
    assert all(p not in optimizer.state for p in model["none"].parameters())
    optimizer.finish()


# ------------------------------------------------------------------------------------ optimisers with two modes


class ScheduleFree(torch.optim.Optimizer):
    """SGD in the style of Defazio et al. 2024: gradients are taken at y, the average x is evaluated, z is stepped."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _swap(self, training):
        for group in self.param_groups:
            if group["train_mode"] != training:
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                with torch.no_grad():
                    for p in group["params"]:
                        if "z" in self.state[p]:
                            p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = training

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("evaluating", ["all", "none", "one"])
@pytest.mark.parametrize("name", ANY_OPTIMIZER)
def test_an_optimizer_with_two_modes_ends_alike(comm, name, evaluating):
    model = mlp()
    more = {} if name == "Synchronous" else {"communication_window": 2}
    optimizer = ALL[name](ScheduleFree(model.parameters(), lr=0.02), model, comm=comm, **more)
    optimizer.train()
    quiet = comm.rank == 1 and name != "Synchronous"  # a worker without data has no z
    train(comm, model, optimizer, 0 if quiet else 5)
    if evaluating == "all" or (evaluating == "one" and comm.rank == 0):
        optimizer.eval()
    optimizer.finish()
    assert_alike(comm, model)
    assert {group["train_mode"] for group in optimizer.param_groups} == {evaluating == "none"}
    trained = copy.deepcopy(model.state_dict())
    optimizer.eval()
    assert_alike(comm, model)
    optimizer.verify()
    assert (evaluating == "none") != all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- SyncBatchNorm


@pytest.mark.parametrize("name", ALL)
def test_sync_batch_norm_without_a_process_group(comm, name):
    model = torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.BatchNorm1d(2))
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(mpidl.ArgumentError, match=r"module 1 is a SyncBatchNorm.*use BatchNorm layers"):
        ALL[name](sgd(model), model, comm=comm)
