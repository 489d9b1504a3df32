"""`MPIDL_REPLAY`: a recorded order of exchanges, followed again, gives the same bits, however fast workers are."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bed import FOLDER
from family_helpers import KINDS, OVERLAPPED, sgd
from training_helpers import abandon, batch, loss_of, mlp

import mpidl
from mpidl.parameter_server.worker import replay

WITH_OTHERS = True
SERVERS = (0, 1)


@pytest.fixture
def log(request, monkeypatch):
    file = Path(os.environ[FOLDER]) / f"{request.node.name}.log"
    monkeypatch.setenv(replay.VARIABLE, str(file))
    monkeypatch.setattr(replay, "_made", 0)
    return file


def train(comm, kind, steps, pauses, **given):
    """Trains with random pauses of up to 3 ms; returns the end's parameters and this rank's staleness."""
    replay._made = 0
    model, draw = mlp(), random.Random(pauses * 100 + comm.rank)
    given = {"communication_window": 2, **given}
    with kind(sgd(model, 0.05), model, comm=comm, **given) as optimizer:
        for step in range(steps + comm.rank % 2):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step)).backward()
            time.sleep(0.003 * draw.random())
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), dict(optimizer.statistics.staleness)


@pytest.mark.parametrize("name", KINDS | OVERLAPPED)
def test_a_run_that_follows_a_log_ends_with_the_same_bits(world_comm, log, name):
    comm = world_comm
    more, kind = {"n_fetch": 3} if name.startswith("DistBelief") else {}, (KINDS | OVERLAPPED)[name]
    first, staleness = train(comm, kind, 5, 1, **more)
    order = json.loads(log.read_text())["order"]
    # Every exchange of every worker once; a fetch of DistBelief that meets no push is one too.
    assert set(order) == set(range(comm.size)) and len(order) >= comm.size * 3
    again, same = train(comm, kind, 5, 2, **more)
    assert torch.equal(first, again)
    assert staleness == same
    assert json.loads(log.read_text())["order"] == order


def test_another_order_gives_another_result(world_comm, log):
    """So that the test above can fail: the log decides, and not chance."""
    comm = world_comm
    first, _ = train(comm, mpidl.ADAG, 5, 1)
    if comm.rank == 0:
        content = json.loads(log.read_text())
        log.write_text(json.dumps({**content, "order": sorted(content["order"])}))
    comm.barrier()
    again, staleness = train(comm, mpidl.ADAG, 5, 1)
    assert not torch.equal(first, again)
    assert staleness[0] >= 2  # one worker after the other


def test_a_log_of_another_run_is_refused_on_every_rank(world_comm, log):
    comm = world_comm
    model = mlp()
    for content, says in (
        ("{", "is no log of exchanges"),
        ('{"algorithm": "AGN", "workers": 2, "order": [0]}', "log of AGN on 2 worker"),
    ):
        comm.barrier()
        if comm.rank == 0:
            log.write_text(content)
        comm.barrier()
        replay._made = 0
        with pytest.raises(mpidl.ArgumentError, match=says):
            mpidl.Downpour(sgd(model), model, comm=comm)
    comm.barrier()
    with pytest.raises(mpidl.ArgumentError, match="max_clock_spread"):
        mpidl.Downpour(sgd(model), model, max_clock_spread=1, comm=comm)


def test_exchanges_that_the_log_does_not_have_are_refused(world_comm, log):
    comm = world_comm
    if comm.rank == 0:
        order = list(range(comm.size))
        log.write_text(json.dumps({"algorithm": "Downpour", "workers": comm.size, "order": order}))
    comm.barrier()
    model = mlp()
    optimizer = mpidl.Downpour(sgd(model), model, communication_window=1, comm=comm)
    optimizer.zero_grad()
    optimizer.step()
    with pytest.raises(mpidl.ArgumentError, match=rf"rank {comm.rank} exchanges more than the 1 time"):
        optimizer.step()
    optimizer._steps = 0
    comm.barrier()
    optimizer.finish()
    assert np.array_equal(optimizer.snapshot()[0], comm.size)


def test_exchanges_that_are_missing_are_named(world_comm, log):
    comm = world_comm
    if comm.rank == 0:
        order = list(range(comm.size))
        log.write_text(json.dumps({"algorithm": "Downpour", "workers": comm.size, "order": order}))
    comm.barrier()
    model = mlp()
    optimizer = mpidl.Downpour(sgd(model), model, comm=comm)
    with pytest.raises(mpidl.ArgumentError, match=rf"rank {comm.rank} exchanges 0 and not the 1 time"):
        optimizer.finish()
    optimizer._center.close()
    abandon(optimizer)
