"""The progress thread moves gradients on during backward: with it the same things hold; imported tests see it only."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from copies import copied
from test_synchronous import test_equals_one_rank_with_all_samples, test_uneven_loaders

import mpidl
from mpidl.arrays import view
from mpidl.collectives import Collectives

__all__ = ["test_equals_one_rank_with_all_samples", "test_uneven_loaders"]

WITH_OTHERS = True
ANY_MPI = True
SIZES = (2, 4)
pytestmark = pytest.mark.whole_product  # some of it is skipped


@pytest.fixture(params=["on one node", "on nodes of 2", "on some ranks"])
def way(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def comm(comm: mpidl.Communicator, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[mpidl.Communicator]:
    monkeypatch.setenv("MPIDL_HELPER", "0" if way == "on some ranks" and comm.rank % 2 else "1")
    if way == "on nodes of 2" and comm.size == 2:
        pytest.skip("one node")
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 2 if way == "on nodes of 2" else comm.size) as copy:
        yield copy


def threads() -> int:
    return len(list(Path(f"/proc/{os.getpid()}/task").iterdir()))


def test_it_is_there_until_finish(comm: mpidl.Communicator):
    model = torch.nn.Linear(50, 50)
    before = threads()
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    wished = os.environ["MPIDL_HELPER"] == "1"
    assert threads() == before + wished
    model(torch.ones(3, 50)).sum().backward()
    optimizer.step()
    optimizer.finish()
    assert threads() == before


def test_calls_go_on_while_this_rank_does_something_else(comm: mpidl.Communicator, way: str):
    ranks = Collectives(comm.topology, progress_thread=os.environ["MPIDL_HELPER"] == "1")
    x, out = np.full(300_000, comm.rank + 1.0), np.empty(300_000)
    comm.barrier()
    request = ranks.start_sum((1, 1), view.view(x), view.view(out), 1)
    if way == "on one node":
        time.sleep(0.5)  # nobody asks
        assert request.Test()
    while not request.tried():
        pass
    assert (out == comm.size * (comm.size + 1) / 2).all()
    ranks.end_progress_thread()
    comm.barrier()


def test_one_that_is_dropped_half_way_ends_its_thread(comm: mpidl.Communicator):
    before, topology = threads(), comm.topology.duplicate("a duplicate that nobody frees")
    ranks = Collectives(topology, progress_thread=os.environ["MPIDL_HELPER"] == "1")
    x = np.ones(300_000)
    if comm.rank == 0:  # the others never come
        ranks.start_sum((1, 1), view.view(x), view.view(np.empty_like(x)), 1)
    del ranks, topology
    gc.collect()
    assert threads() == before
    comm.barrier()


def test_a_wish_that_makes_no_sense_is_refused_by_all(comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPIDL_HELPER", "yes" if comm.rank == 1 else "")
    model = torch.nn.Linear(2, 2)
    with pytest.raises((mpidl.ArgumentError, mpidl.MismatchError), match=r"MPIDL_HELPER='yes'"):
        mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
