"""A variable in shared memory, seen from its ranks: who waits for a lock can be reached, refusals are sentences."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import time

import numpy as np
import pytest

from mpidl.errors import ArgumentError, ClosedError, RankFailedError, SharedMemoryError
from mpidl.mpi import exit_protocol, shared_memory
from mpidl.mpi.processes import Process
from mpidl.one_sided import locked_array
from mpidl.one_sided.window import Plan
from mpidl.parameter_server.center.center import Center

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1,)
COUNT = 100_000  # elements: seven blocks of 128 KiB, the last one not full
GONE = 4711  # the process of a rank that has died


@pytest.fixture
def blocks(world_comm):
    comm = world_comm
    if len(set(comm.topology.placement.nodes)) > 1:
        pytest.skip("ranks of several nodes share no memory")
    ranks = comm.topology.duplicate("test of the blocks")
    made = Plan("a variable", "float64", (COUNT,) + (0,) * (comm.size - 1), COUNT).make(ranks)
    yield made
    made.close()
    ranks.free()


def first_lock(blocks):
    return ctypes.c_uint32.from_address(blocks._center.memory)


def version(blocks):
    return ctypes.c_uint64.from_address(blocks._center.memory + 8)


def test_who_waits_for_a_lock_looks_around_says_so_and_goes_on(world_comm, blocks, monkeypatch):
    looks, said, out = [], [], np.empty(COUNT)
    monkeypatch.setattr(locked_array, "_SAY_AFTER", 0.05)
    monkeypatch.setattr(exit_protocol, "say", said.append)
    if world_comm.rank == 0:
        first_lock(blocks).value = world_comm.size  # the last rank's mark
    world_comm.barrier()
    blocks.look = lambda: looks.append(time.monotonic())
    freed = threading.Timer(0.15, lambda: setattr(first_lock(blocks), "value", 0))
    if world_comm.rank == 0:
        freed.start()
    blocks.add(0, np.full(COUNT, world_comm.rank + 1.0), after=out)
    assert len(looks) >= 3
    assert len(said) == 1 and "), which holds a part of a variable: is it stopped?" in said[0]
    assert f"for rank {world_comm.size - 1} (process " in said[0]
    world_comm.barrier()
    blocks.read(0, out)
    assert (out == sum(range(1, world_comm.size + 1))).all()


def somebody_is_dead(ranks):
    """The last rank's process is one that is no more."""
    placement = ranks.placement
    gone = Process(GONE, start=-1, visible=True)
    ranks.placement = dataclasses.replace(placement, processes=(*placement.processes[:-1], gone))


def test_a_lock_whose_holder_has_died_is_taken_away_if_its_block_is_whole(world_comm, blocks):
    if world_comm.rank == 0:
        first_lock(blocks).value = world_comm.size  # the last rank's mark
    world_comm.barrier()
    somebody_is_dead(blocks._ranks)
    living, out = world_comm.rank < world_comm.size - 1, np.empty(COUNT)
    if living:
        blocks.add(0, np.full(COUNT, world_comm.rank + 1.0))
    world_comm.barrier()
    if living:
        blocks.read(0, out)
        assert (out == sum(range(1, world_comm.size))).all()
    world_comm.barrier()  # nobody reads any more
    assert first_lock(blocks).value == 0
    world_comm.barrier()


def test_half_a_block_is_not_gone_on_with(world_comm, blocks):
    if world_comm.rank == 0:
        first_lock(blocks).value = world_comm.size  # the last rank's mark
        version(blocks).value += 1
    world_comm.barrier()
    somebody_is_dead(blocks._ranks)
    last = world_comm.size - 1
    with pytest.raises(RankFailedError, match=rf"rank {last} \(process {GONE}\) died while it changed a variable"):
        blocks.read(10, np.empty(5))
    assert first_lock(blocks).value == world_comm.size
    if world_comm.rank < last:
        blocks.read(COUNT - 5, np.empty(5))  # other blocks are free
    world_comm.barrier()
    first_lock(blocks).value = 0
    world_comm.barrier()


def test_who_waits_while_another_rank_dies_hears_of_it(world_comm, blocks):

    def dead():
        raise RankFailedError("planted")

    first_lock(blocks).value = world_comm.size  # the last rank's mark
    blocks.look = dead
    with pytest.raises(RankFailedError, match="planted"):
        blocks.read(10, np.empty(5))
    assert first_lock(blocks).value == world_comm.size
    world_comm.barrier()
    blocks.read(COUNT - 5, np.empty(5))  # other blocks are free
    world_comm.barrier()
    first_lock(blocks).value = 0
    world_comm.barrier()


def test_too_little_memory_is_a_sentence_on_every_rank(world_comm):
    if len(set(world_comm.topology.placement.nodes)) > 1:
        pytest.skip("ranks of several nodes share no memory")
    count = 1 << 48
    with pytest.raises(SharedMemoryError, match=f"{shared_memory.FOLDER} has no room for the"):
        Plan("a variable", "float64", (0,) * world_comm.size, count).make(world_comm.topology)


def protocol_of(ranks):
    server = Center(ranks, np.zeros(COUNT), "test")
    out = np.empty(COUNT)
    server.commit_and_pull(np.ones(COUNT), out)
    protocol = server.protocol
    server.close()
    return protocol


def test_a_setting_on_one_rank_only_holds_for_all(world_comm, monkeypatch):
    last = world_comm.rank == world_comm.size - 1
    monkeypatch.setenv(shared_memory.SWITCH, "0" if last else "1")
    assert protocol_of(world_comm.topology) == "rma"
    monkeypatch.setenv(shared_memory.SWITCH, "yes" if last else "1")
    with pytest.raises(ArgumentError, match="expected 0" if last else f"rank {world_comm.size - 1} refused its"):
        protocol_of(world_comm.topology)


def test_one_rank_needs_nothing_that_has_a_size(comm, monkeypatch):
    monkeypatch.setattr(shared_memory, "map_memory", lambda *_: pytest.fail("/dev/shm was used"))
    assert protocol_of(comm.topology) == "node"


def test_what_is_closed_says_so(world_comm, blocks):
    blocks.close()
    with pytest.raises(ClosedError, match="the shared memory of a variable is not open"):
        blocks.read(0, np.empty(1))
