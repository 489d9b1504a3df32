"""The progress thread runs on ranks that hold a shard for workers of other nodes, and only while the center is open."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import mpidl
from mpidl.collectives import communicator
from mpidl.mpi import runtime
from mpidl.parameter_server.center.center import Center

WITH_OTHERS = True
ELEMENTS = 64 * 12  # a shard for each of up to 12 owners


def helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mpidl progress")]


@contextmanager
def on_nodes_of(
    comm: mpidl.Communicator, node_size: int, monkeypatch: Any, servers: int = 0
) -> Iterator[mpidl.Communicator | None]:
    """The ranks of `comm` as if they were on nodes of `node_size`, the last ones as servers; None on those."""
    monkeypatch.setenv("MPIDL_NODE_SIZE", str(node_size))
    copy = mpidl.Communicator(comm.topology.data)
    made = communicator.split_servers(copy.topology.duplicate("pretended nodes"), servers)
    yield made
    if made is not None:
        made.free()
    comm.barrier()
    copy.free()


@pytest.mark.parametrize("node_size", [1, 2, 4])
@pytest.mark.parametrize("count", [ELEMENTS, 1, 0])
def test_it_runs_exactly_where_a_shard_may_be_needed_from_another_node(comm, count, node_size, monkeypatch):
    with on_nodes_of(comm, node_size, monkeypatch) as copy:
        server = Center(copy.topology, np.zeros(count), "test", copy.dedicated_servers)
        holds = comm.rank == 0 or count == ELEMENTS  # rank 0 has the clock
        expected = ["mpidl progress of test"] if holds and comm.size > node_size else []
        assert helpers() == expected
        server.commit(np.ones(count))
        copy.barrier()
        server.close()
        assert helpers() == []


@pytest.mark.parametrize("servers", [1, 2])
def test_workers_of_dedicated_servers_need_none(world_comm, servers, monkeypatch):
    with on_nodes_of(world_comm, 1, monkeypatch, servers) as copy:
        if copy is None:
            return
        server = Center(copy.topology, np.zeros(ELEMENTS), "test", copy.dedicated_servers)
        assert helpers() == []
        server.commit(np.ones(ELEMENTS))
        copy.barrier()
        out = np.empty(ELEMENTS)
        assert server.pull(out) == copy.size and (out == copy.size).all()
        copy.barrier()
        server.close()


def test_it_enters_mpi_again_and_again(world_comm, monkeypatch):
    """What it tests is completed for once: nobody but the thread looks at that request."""
    with on_nodes_of(world_comm, 1, monkeypatch) as copy:
        server = Center(copy.topology, np.zeros(ELEMENTS), "test", copy.dedicated_servers)
        mpi, ranks, progress = runtime.mpi(), server._ranks, server._progress
        assert progress._request != mpi.REQUEST_NULL
        sent = ranks.data.Isend([np.zeros(1, np.uint8), mpi.BYTE], dest=ranks.rank, tag=9)
        deadline = time.monotonic() + 30
        while progress._request != mpi.REQUEST_NULL and time.monotonic() < deadline:
            time.sleep(0.01)
        assert progress._request == mpi.REQUEST_NULL
        sent.Wait()
        progress._end.set()
        progress._thread.join()  # it would test what is no request
        progress._request = None  # nothing left to cancel
        server.end_progress()
        server.close()


@pytest.mark.parametrize("protocol", ["active_message", "rma"])
def test_finish_ends_it_whether_it_succeeds_or_fails(world_comm, protocol, monkeypatch):
    """A second finish() starts it again: the other ranks' pulls are answered by it."""
    monkeypatch.setenv("MPIDL_CENTER", protocol)
    with on_nodes_of(world_comm, 1, monkeypatch) as copy:
        model = torch.nn.Linear(ELEMENTS, 1)
        optimizers = [
            kind(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=copy) for kind in (mpidl.AGN, mpidl.Downpour)
        ]
        assert sorted(helpers()) == ["mpidl progress of AGN", "mpidl progress of Downpour"]
        with monkeypatch.context() as planted:
            planted.setattr(mpidl.AGN, "_close", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizers[0].finish()
        assert helpers() == ["mpidl progress of Downpour"]
        optimizers[1].finish()
        assert helpers() == []
        time.sleep(0.1 * copy.rank)  # the last rank pulls while the others wait for it in a barrier
        optimizers[0].finish()
        assert helpers() == []
