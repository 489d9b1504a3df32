"""Replicas that drift: what `Synchronous` compares at every step and in `finish()`, and `verify()` of every class."""

from __future__ import annotations

import copy

import pytest
import torch
from copies import copied
from family_helpers import KINDS
from training_helpers import abandon, assert_alike, batch, loss_of, mlp

import mpidl
from mpidl.mpi import exit_protocol

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3)
APART = KINDS | {"ModelAveraging": mpidl.ModelAveraging, "DiLoCo": mpidl.DiLoCo}


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **more})


def wrapped(comm, model=None, optimizer_of=sgd, **more):
    model = mlp() if model is None else model
    return model, mpidl.Synchronous(optimizer_of(model), model, comm=comm, **more)


def train(comm, model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step, dtype=next(model.parameters()).dtype)).backward()
        optimizer.step()


def one_sentence(comm, error):
    """The message, which must be the same on all ranks."""
    text = str(error.value).encode().ljust(2000)
    assert len(set(map(bytes, comm.allgather(torch.tensor(list(text), dtype=torch.uint8)).numpy()))) == 1
    return text.decode().strip()


# ------------------------------------------------------------------------------------------ numbers in param_groups


def given(key, value):
    def change(optimizer, rank):
        optimizer.param_groups[0][key] = value(rank)

    return change


CHANGES = {
    "lr": ("lr", given("lr", lambda rank: 0.05 if rank == 2 else 0.1)),
    "tensor": ("lr", given("lr", lambda rank: torch.tensor(0.5 if rank == 2 else 0.25))),
    "missing": ("warm", lambda optimizer, rank: rank == 2 and optimizer.param_groups[0].update(warm=1)),
    "betas": ("betas", given("betas", lambda rank: (0.9, 0.99 if rank == 2 else 0.999))),
    "list": ("betas", given("betas", lambda rank: [0.9, 0.99 if rank == 2 else 0.999])),
    "bool": ("amsgrad", given("amsgrad", lambda rank: rank == 2)),
    "nothing": ("", lambda optimizer, rank: optimizer.param_groups[0].update(note=f"of {rank}", odd=float("nan"))),
}


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_number_in_param_groups_that_differs(comm, change, shard):
    if shard and change == "tensor":
        return
    key, apply = CHANGES[change]
    model, optimizer = wrapped(comm, optimizer_of=lambda model: torch.optim.Adam(model.parameters()), shard=shard)
    train(comm, model, optimizer, 2)
    apply(optimizer, comm.rank)
    if not key or comm.size == 1:
        train(comm, model, optimizer, 2)
        optimizer.finish()
        return
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mpidl.MismatchError, match=f"^{key} of parameter group 0 is .* on rank") as error:
        train(comm, model, optimizer, 1)
    assert "on ranks 0, 1 and" in one_sentence(comm, error) and "on rank 2" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    abandon(optimizer)


def test_a_tensor_changed_in_place_and_a_plateau_on_the_local_loss(comm):
    lr = torch.tensor(0.1)
    model, optimizer = wrapped(comm, optimizer_of=lambda m: torch.optim.Adam(m.parameters(), lr=lr, foreach=False))
    train(comm, model, optimizer, 2)
    if comm.size > 1:
        optimizer.param_groups[0]["lr"].mul_(1 + comm.rank)
        with pytest.raises(mpidl.MismatchError, match="lr of parameter group 0"):
            train(comm, model, optimizer, 1)
        abandon(optimizer)
        model, optimizer = wrapped(comm)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        train(comm, model, optimizer, 1)
        for loss in (1.0, 1.0 + comm.rank - 1):  # better on rank 0
            scheduler.step(loss)
        with pytest.raises(mpidl.MismatchError, match="was ReduceLROnPlateau given the local loss") as error:
            train(comm, model, optimizer, 1)
        assert "is 0.1 on rank 0 and 0.05 on ranks 1, 2" in one_sentence(comm, error)
        abandon(optimizer)
    else:
        optimizer.finish()


# ------------------------------------------------------------------------------------------------- drifting weights


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(40, 6, max_norm=0.5)
        self.last = torch.nn.Linear(6, 1)

    def forward(self, rows):
        return self.last(self.table(rows)).square().mean()


def load_on_rank_0(model, rank):
    if rank == 0:
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def initialise_anew(model, rank):
    torch.manual_seed(rank)
    with torch.no_grad():
        model[2].reset_parameters()


def flip_a_bit(model, rank):
    if rank == 1:
        model[2].weight.detach().numpy().view("int64").reshape(-1)[17] ^= 1 << 40


DRIFTS = {"load": load_on_rank_0, "initialise": initialise_anew, "flip": flip_a_bit}
NAMED = {"load": "parameter 0.weight", "initialise": "parameter 2.weight", "flip": "parameter 2.weight"}


def unequal(model, name):
    return pytest.raises(mpidl.MismatchError, match=f"{name} differs between ranks.*by up to.*from rank")


@pytest.mark.parametrize("drift", DRIFTS)
def test_weights_that_drift_are_found_within_some_steps_at_the_end_and_on_demand(comm, drift):
    for found_by in ("steps", "verify", "finish") if comm.size > 1 else ():
        model, optimizer = wrapped(comm)
        train(comm, model, optimizer, 3)
        DRIFTS[drift](model, comm.rank)
        if found_by == "steps":
            with unequal(model, NAMED[drift]) as error:
                train(comm, model, optimizer, 16 * 9 + 2)
            abandon(optimizer)
        elif found_by == "verify":
            with unequal(model, NAMED[drift]) as error:
                optimizer.verify()
            train(comm, model, optimizer, 1)
            abandon(optimizer)
        else:
            with unequal(model, NAMED[drift]) as error:
                optimizer.finish()
            optimizer.finish()  # it has ended: harmless
        text = one_sentence(comm, error)
        if drift == "flip":
            assert "rank 1 by up to" in text and "from ranks 0, 2;" in text
        if drift == "load" and found_by == "verify":
            assert "rank 0 by up to 1 from ranks 1, 2, and so do 5 more of 6" in text


def test_an_embedding_that_renormalises_in_forward(comm):
    model, optimizer = wrapped(comm, Words())
    if comm.size == 1:
        optimizer.finish()
        return
    with unequal(model, "parameter table.weight") as error:
        for step in range(20):
            optimizer.zero_grad()
            model(torch.randint(0, 40, (3,), generator=torch.Generator().manual_seed(comm.rank + 10 * step))).backward()
            optimizer.step()
    assert "max_norm" in one_sentence(comm, error)
    abandon(optimizer)


def test_nodes_whose_shared_weights_drift(comm, monkeypatch):
    """A step makes them equal again: each element comes from the rank that owns it."""
    if comm.size == 1:
        return
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 1) as ranks:
        for found_by in ("verify", "finish"):
            model, optimizer = wrapped(ranks, shard=True)
            train(ranks, model, optimizer, 2)
            if comm.rank == 2:
                model[4].bias.data.add_(1)
            error = None
            try:
                if found_by == "verify":
                    optimizer.verify()
                optimizer.finish()
            except mpidl.MismatchError as found:
                error = found
            assert error is not None and "rank 2 by up to 1 from ranks 0, 1" in str(error), (found_by, error)
            abandon(optimizer)


# --------------------------------------------------------------------------------------------------- not a drift


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_that_end_early_are_not_taken_for_drift(comm, shard):
    frozen = mlp()
    model = torch.nn.ModuleDict({"net": mlp(), "teacher": frozen})
    frozen.requires_grad_(False)
    model.forward = lambda x: model["net"](x) - 0 * frozen(x)
    optimizer = mpidl.Synchronous(sgd(model["net"]), model, comm=comm, shard=shard)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(17 + 3 * comm.rank):
        train(comm, model, optimizer, 1, step)
        scheduler.step()
        with torch.no_grad():
            for old, new in zip(frozen.parameters(), model["net"].parameters(), strict=True):
                old.lerp_(new, 0.1)
        if step == 16 + 3 * (comm.size - 1):
            optimizer.verify() if comm.size == 1 else None
    if comm.rank == comm.size - 1:
        optimizer.verify()  # the others are in finish()
    optimizer.finish()
    optimizer.verify()
    assert_alike(comm, model)


def test_what_changes_between_steps_and_is_put_back(comm):
    """Sharpness-aware steps climb on each rank by its own gradient; averaged weights are swapped in for evaluation."""
    model, optimizer = wrapped(comm)
    for step in range(18):
        optimizer.zero_grad()
        with optimizer.no_sync():
            loss_of(model, batch(comm.rank, step)).backward()
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=0.1)
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.5, 0.5)
    optimizer.finish()
    assert_alike(comm, model)


def test_a_scaler_that_skips_steps(comm):
    model, optimizer = wrapped(comm, mlp(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=3)
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, batch(comm.rank, step, dtype=torch.float32))
        scaler.scale(loss * (float("inf") if step % 7 == comm.rank else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0 < optimizer.statistics.steps < 20
    optimizer.finish()
    assert_alike(comm, model)


# ------------------------------------------------------------------------------------------------- the same data


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("data", ["same", "one step", "own", "one rank differs", "zeros", "no samples"])
def test_equal_gradients_of_the_first_batch_are_named_once(comm, monkeypatch, data, shard):
    said = []
    monkeypatch.setattr(exit_protocol, "say", said.append)
    model, optimizer = wrapped(comm, shard=shard)
    for step in range(1 if data == "one step" else 3):
        who = {"own": comm.rank, "one rank differs": comm.rank // 2}.get(data, 0)
        optimizer.zero_grad()
        with optimizer.samples(4 if data != "no samples" or comm.rank == 0 else 0):
            (loss_of(model, batch(who, step)) * (data != "zeros")).backward()
        optimizer.step()
    optimizer.finish()
    assert len(said) == (data in ("same", "one step") and comm.size > 1 and comm.rank == 0), said
    assert all("DistributedSampler" in text for text in said)


# ------------------------------------------------------------------------------------------- verify() everywhere


@pytest.mark.parametrize("name", APART)
def test_verify_of_the_classes_whose_ranks_take_local_steps(comm, name):
    model = mlp()
    optimizer = APART[name](torch.optim.SGD(model.parameters(), lr=0.01), model, comm=comm, communication_window=2)
    periodic = name in ("ModelAveraging", "DiLoCo")
    train(comm, model, optimizer, 3)
    optimizer.verify()  # in the midst of a window weights differ, by design
    if periodic:
        train(comm, model, optimizer, 1)
        optimizer.verify()
        if comm.rank == 1:
            model[0].bias.data.add_(1)
        if comm.size > 1:
            with unequal(model, "parameter 0.bias"):
                optimizer.verify()
            model[0].bias.data.sub_(1) if comm.rank == 1 else None
            model[0].bias.data.copy_(comm.broadcast(model[0].bias.detach().clone(), 0))
    optimizer.finish()
    optimizer.verify()
    if comm.rank == 1:
        model[4].bias.data.add_(1)
    if comm.size > 1:
        with unequal(model, r"parameter 4\.bias"):
            optimizer.verify()
