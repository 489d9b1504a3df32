"""`mpidl.Synchronous(shard=True)` takes the unsharded step, bit for bit where additions are in one order."""

from __future__ import annotations

import pytest
import torch
from copies import copied
from sharded_helpers import Net, same, same_state, train
from training_helpers import assert_alike, assert_close

import mpidl
from mpidl.collectives import cost_model
from mpidl.collectives.lanes import pipeline
from mpidl.mpi.topology import Topology

WITH_OTHERS = True
ANY_MPI = True

OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.1, **o),
    "momentum": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "nesterov": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, amsgrad=True, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1, **o),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "asgd": lambda p, **o: torch.optim.ASGD(p, t0=3, **o),
    "rprop": torch.optim.Rprop,
}
FIFTY = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_bit_for_bit_the_unsharded_ones(comm, name):
    steps = 50 if name in FIFTY else 8
    dtype = torch.float64 if name in ("momentum", "adamw") else torch.float32
    expected, plain = train(comm, OPTIMIZERS[name], shard=False, steps=steps, dtype=dtype)
    model, optimizer = train(comm, OPTIMIZERS[name], shard=True, steps=steps, dtype=dtype)
    same(model, expected)
    assert_alike(comm, model)
    same_state(optimizer.full_state_dict(), plain.state_dict())
    plain.finish()
    optimizer.finish()
    same(model, expected)


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "adagrad"])
def test_foreach_and_fused(comm, name, how):
    def make(p):
        return OPTIMIZERS[name](p, **{how: True})

    # torch's fused SGD cannot do with a parameter that gets its first momentum later than others.
    options = {"steps": 6, "bucket_cap_mb": 2e-3, "alternate": (name, how) != ("momentum", "fused")}
    expected, plain = train(comm, make, shard=False, **options)
    model, optimizer = train(comm, make, shard=True, **options)
    same(model, expected)
    same_state(optimizer.full_state_dict(), plain.state_dict())
    plain.finish()
    optimizer.finish()


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_ranks_that_own_nothing(comm, name, how):
    models = []
    for shard in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1, bias=False)
        inner = OPTIMIZERS[name](model.parameters(), **{how: True})
        with mpidl.Synchronous(inner, model, comm=comm, shard=shard) as optimizer:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.full((1, 3), comm.rank + 1.0)).square().sum().backward()
                optimizer.clip_grad_norm_(1e6)
                optimizer.step()
            optimizer.load_state_dict(optimizer.full_state_dict())
        models.append(model)
    same(models[1], models[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_half_types(comm, name, dtype):
    def make(p):
        return OPTIMIZERS[name](p, **({"eps": 1e-4} if name == "adamw" else {}))  # 1e-8 is 0 in float16

    expected, plain = train(comm, make, shard=False, steps=6, dtype=dtype)
    model, optimizer = train(comm, make, shard=True, steps=6, dtype=dtype)
    same(model, expected)
    plain.finish()
    optimizer.finish()


@pytest.mark.whole_product  # some of it does nothing
@pytest.mark.parametrize("value", [1, 2, 3])
@pytest.mark.parametrize(("name", "exchange"), [("momentum", "direct"), ("adam", "halving_doubling")])
def test_across_nodes_bit_for_bit_as_without_shard(comm, monkeypatch, value, name, exchange):
    """4 ranks on nodes of 3, and 3 on nodes of 2, are groups of one rank: `direct` adds these in the same order too."""
    if value >= comm.size:
        return
    force(monkeypatch, exchange)
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", value) as ranks:
        expected, plain = train(ranks, OPTIMIZERS[name], shard=False, steps=6, bucket_cap_mb=4e-3)
        model, optimizer = train(ranks, OPTIMIZERS[name], shard=True, steps=6, bucket_cap_mb=4e-3)
        if exchange == "direct" or comm.size % value == 0:
            same(model, expected)
            same_state(optimizer.full_state_dict(), plain.state_dict())
        else:
            assert_close(model, expected, 1e-4)
        assert_alike(comm, model)
        plain.finish()
        optimizer.finish()


def force(monkeypatch, exchange):
    """Slices are so small that a bucket takes many segments."""
    monkeypatch.setattr(cost_model, "choose", lambda *_, **__: exchange)
    monkeypatch.setattr(cost_model, "choose_exchange", lambda *_, **__: exchange)
    monkeypatch.setattr(pipeline, "SLICE", 512)


def whole_steps(comm, make, steps, *, shard, **options):
    """Gradients that are whole numbers, so that their sum does not depend on the order."""
    model = Net()
    optimizer = mpidl.Synchronous(make(model.groups()), model, comm=comm, shard=shard, bucket_cap_mb=3e-3, **options)
    for step in range(steps):
        optimizer.zero_grad()
        used = [p for i, p in enumerate(model.parameters()) if p.requires_grad and (i + comm.rank) % 3 != step % 3]
        sum((p * (comm.rank + step % 5 - 2)).sum() for p in used).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.whole_product  # some of it does nothing
@pytest.mark.parametrize("name", FIFTY)
def test_across_nodes_bit_for_bit_where_the_order_does_not_matter(comm, monkeypatch, name):
    if comm.size == 1 or (comm.size < 4 and name not in ("momentum", "adam")):  # each of the others: 2 nodes of 2
        return
    expected, plain = whole_steps(comm, OPTIMIZERS[name], 50, shard=False)
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", (comm.size + 1) // 2) as ranks:  # two nodes
        model, optimizer = whole_steps(ranks, OPTIMIZERS[name], 50, shard=True)
        same(model, expected)
        same_state(optimizer.full_state_dict(), plain.state_dict())
        optimizer.finish()
    plain.finish()


def test_gradients_travel_narrow_and_weights_as_they_are(comm, monkeypatch):
    if comm.size == 1:
        return
    force(monkeypatch, "direct")
    models, nbytes, steps = [], [], 3
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", (comm.size + 1) // 2) as ranks:
        real = Topology.start_send
        sent = []
        monkeypatch.setattr(Topology, "start_send", lambda self, *what: (sent.append(what[1]), real(self, *what))[1])
        for wire_dtype in (None, torch.bfloat16):
            model, optimizer = whole_steps(ranks, OPTIMIZERS["adam"], steps, shard=True, wire_dtype=wire_dtype)
            models.append(model)
            nbytes.append(sum(sent))
            sent.clear()
            optimizer.finish()
    same(models[1], models[0])
    once, rest = divmod(nbytes[0], 2 * steps + 1)  # weights also when they are made
    assert once > 0 == rest
    assert nbytes[1] == once * (steps + 1) + once * steps // 2


def test_without_shared_memory_every_rank_has_weights_of_its_own(comm, monkeypatch):
    expected, plain = whole_steps(comm, OPTIMIZERS["adam"], 5, shard=False)
    with copied(comm, monkeypatch, "MPIDL_SHARED_MEMORY", 0) as ranks:
        model, optimizer = whole_steps(ranks, OPTIMIZERS["adam"], 5, shard=True)
        same(model, expected)
        optimizer.finish()
    plain.finish()


@pytest.mark.parametrize("size", [0, 2])
def test_each_rank_owns_its_share_of_the_state(comm, monkeypatch, size):
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", size or "") as ranks:
        model = torch.nn.Linear(300, 200)
        optimizer = mpidl.Synchronous(torch.optim.Adam(model.parameters()), model, comm=ranks, shard=True)
        model(torch.ones(1, 300)).sum().backward()
        optimizer.step()
        owned = sum(entry["exp_avg"].numel() for entry in optimizer.state.values())
        assert owned <= 60200 / comm.size + 64 * comm.size
        assert comm.allreduce(torch.tensor([float(owned)])).item() == 60200
        optimizer.finish()
