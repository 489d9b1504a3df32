"""Who shares a node: `node`, `lane`, pretended nodes, communicators of the user's, threads per rank."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from copies import copied
from known import assert_same

import mpidl
from mpidl.mpi import runtime

WITH_OTHERS = True


def ranks_of(part: mpidl.Communicator, whole: mpidl.Communicator) -> list[int]:
    return [int(r) for r in part.allgather(np.array([whole.rank]))[:, 0]]


def test_ranks_and_nodes_are_mpi_s_own(comm: mpidl.Communicator) -> None:
    mpi_comm = comm.topology.data
    assert (comm.rank, comm.size) == (mpi_comm.rank, mpi_comm.size)
    shared = mpi_comm.Split_type(runtime.mpi().COMM_TYPE_SHARED)
    assert (comm.node.rank, comm.node.size) == (shared.rank, shared.size)
    shared.Free()


@pytest.mark.parametrize("node_size", [1, 2, 3])
def test_pretended_nodes(comm: mpidl.Communicator, node_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = range(comm.size)
    my_node = [r for r in everyone if r // node_size == comm.rank // node_size]
    my_lane = [r for r in everyone if r % node_size == comm.rank % node_size]
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", node_size) as copy:
        assert copy.nodes == -(-comm.size // node_size)
        assert ranks_of(copy.node, copy) == my_node
        assert ranks_of(copy.lane, copy) == my_lane
        assert copy.node.rank == my_node.index(comm.rank)
        assert copy.lane.rank == my_lane.index(comm.rank)
        assert copy.node.nodes == 1
        assert copy.lane.nodes == len(my_lane)
        assert copy.node.node is copy.node
        assert copy.lane.lane is copy.lane
        x = np.array([10.0**comm.rank])
        assert_same(copy.node.allreduce(x), np.array([sum(10.0**r for r in my_node)]))
        assert_same(copy.lane.allreduce(x), np.array([sum(10.0**r for r in my_lane)]))
        # Reducing along node and then lane does not cover a ragged last node; together with all ranks it does.
        if comm.size % node_size == 0:
            assert_same(copy.lane.allreduce(copy.node.allreduce(x)), copy.allreduce(x))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_node_size_that_makes_no_sense_is_refused(
    comm: mpidl.Communicator, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIDL_NODE_SIZE", text)
    with pytest.raises(mpidl.ArgumentError, match="MPIDL_NODE_SIZE"):
        mpidl.Communicator(comm.topology.data)


def test_a_communicator_of_the_user_s(comm: mpidl.Communicator) -> None:
    theirs = comm.topology.data.Split(color=comm.rank % 2, key=-comm.rank)  # reversed order
    members = [r for r in reversed(range(comm.size)) if r % 2 == comm.rank % 2]
    own = mpidl.Communicator(theirs)
    assert ranks_of(own, comm) == members
    own.free()
    assert theirs.allreduce(1) == len(members)  # it is still the user's
    theirs.Free()


def test_what_is_no_communicator_is_refused(comm: mpidl.Communicator) -> None:
    with pytest.raises(mpidl.ArgumentError, match="COMM_NULL"):
        mpidl.Communicator(runtime.mpi().COMM_NULL)
    for wrong in (None, "world", 3):
        with pytest.raises(mpidl.DtypeError, match=r"mpi_comm is a \w+; expected an mpi4py.MPI.Intracomm"):
            mpidl.Communicator(wrong)
    if comm.size == 1:
        return
    side = comm.topology.data.Split(color=comm.rank % 2)
    between = side.Create_intercomm(0, comm.topology.data, 1 - comm.rank % 2)
    with pytest.raises(mpidl.ArgumentError, match="intercommunicator"):
        mpidl.Communicator(between)
    between.Free()
    side.Free()


def test_words_of_any_length_from_every_rank(comm: mpidl.Communicator) -> None:
    found = comm.topology.gather_bytes(b"x" * (3 * comm.rank), "a test")
    assert found == [b"x" * (3 * r) for r in range(comm.size)]


def test_torch_gets_a_fair_part_of_the_cores(world_comm: mpidl.Communicator) -> None:
    mpidl.world()
    fair = max(1, len(os.sched_getaffinity(0)) // world_comm.topology.ranks_on_my_cores())
    assert torch.get_num_threads() == runtime.torch_threads() == fair
