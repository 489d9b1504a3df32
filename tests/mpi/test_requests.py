"""`iallreduce` and its `Request`: several under way, buffers owned, order of completion; and what `free` refuses."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import torch
from known import assert_same

import mpidl
from mpidl.mpi import runtime

WITH_OTHERS = True


def duplicate(comm: mpidl.Communicator) -> mpidl.Communicator:
    """A communicator of the same ranks that a test may free."""
    group = comm.topology.data.Get_group()
    made = comm.topology.data.Create_group(group)
    copy = mpidl.Communicator(made)
    made.Free()
    group.Free()
    return copy


def until_tested(request: mpidl.Request, limit: float = 60) -> None:
    began = time.monotonic()
    while not request.test():
        assert time.monotonic() - began < limit
        time.sleep(0)


def test_several_under_way_waited_for_in_another_order_on_each_rank(comm: mpidl.Communicator) -> None:
    count = 6
    for kind in (np.asarray, torch.from_numpy):
        inputs = [kind(np.arange(5.0) * (comm.rank + 1) + k) for k in range(count)]
        requests = [comm.iallreduce(x) for x in inputs]
        weight = sum(range(1, comm.size + 1))
        for k in np.roll(np.arange(count), comm.rank)[:: 1 if comm.rank % 2 else -1]:
            assert_same(requests[k].wait(), kind(np.arange(5.0) * weight + k * comm.size))


def test_a_blocking_call_between_two_requests(comm: mpidl.Communicator) -> None:
    first = comm.iallreduce(np.ones(3))
    assert_same(comm.allreduce(np.ones(2), op="prod"), np.ones(2))
    second = comm.iallreduce(np.full(3, 2.0))
    comm.barrier()
    assert_same(second.wait(), np.full(3, 2.0 * comm.size))
    assert_same(first.wait(), np.full(3, 1.0 * comm.size))
    assert first.wait() is first.wait()


def test_test_moves_a_call_on_and_never_blocks(comm: mpidl.Communicator) -> None:
    late = comm.size - 1
    if comm.rank == late:
        time.sleep(0.5)
    began = time.monotonic()
    request = comm.iallreduce(np.ones(3))
    done = request.test()
    assert time.monotonic() - began < 0.4
    if comm.size > 1 and comm.rank != late:
        assert not done
    until_tested(request)
    assert request.test()
    assert_same(request.wait(), np.full(3, 1.0 * comm.size))


def test_a_request_owns_its_buffers(comm: mpidl.Communicator) -> None:
    count = 50_000
    requests = []
    for k in range(4):
        x = np.full(count, comm.rank + k + 1.0)
        requests.append(comm.iallreduce(x, out=np.empty(count)))
        requests.append(comm.iallreduce(torch.full((count,), comm.rank + k + 1.0, dtype=torch.bfloat16)))
        del x
    gc.collect()
    garbage = [np.full(count, np.nan) for _ in range(8)]  # takes the memory over, had it been given back
    for k in range(4):
        total = float(sum(r + k + 1 for r in range(comm.size)))
        assert_same(requests[2 * k].wait(), np.full(count, total))
        assert_same(requests[2 * k + 1].wait(), torch.full((count,), total, dtype=torch.bfloat16))
    assert len(garbage) == 8


def test_a_request_that_nobody_waits_for_still_completes(comm: mpidl.Communicator) -> None:
    out = np.zeros(3)
    comm.iallreduce(np.ones(3), out=out)
    gc.collect()
    comm.barrier()
    assert_same(out, np.full(3, 1.0 * comm.size))


def test_an_error_is_raised_by_wait_again_and_again(comm: mpidl.Communicator) -> None:
    request = comm.iallreduce(np.ones(3), op="median")
    until_tested(request)
    for _ in range(2):
        with pytest.raises(mpidl.ArgumentError, match="op is 'median'"):
            request.wait()
    assert_same(comm.allreduce(np.ones(1)), np.full(1, 1.0 * comm.size))


def test_free(comm: mpidl.Communicator) -> None:
    copy = duplicate(comm)
    request = copy.iallreduce(np.ones(3))
    if not request.done:
        with pytest.raises(mpidl.ArgumentError, match="still under way"):
            copy.free()
    request.wait()
    comm.barrier()
    copy.free()
    copy.free()
    with pytest.raises(mpidl.ClosedError, match="was freed"):
        copy.allreduce(np.ones(3))
    assert_same(comm.allreduce(np.ones(1)), np.full(1, 1.0 * comm.size))


def test_the_world_is_never_freed(world_comm: mpidl.Communicator) -> None:
    world = mpidl.world()
    assert mpidl.world() is world
    assert (world.rank, world.size) == (world_comm.rank, world_comm.size)
    with pytest.raises(mpidl.ArgumentError, match="lives as long as MPI"):
        world.free()
    assert_same(world.allreduce(np.ones(1)), np.full(1, 1.0 * world.size))
    with pytest.raises(mpidl.ArgumentError, match="servers=1"):
        mpidl.world(servers=1)


def test_many_communicators_in_turn() -> None:
    """More than MPICH has at a time (2,046), so that a leak of any would show."""
    alone = mpidl.Communicator(runtime.mpi().COMM_SELF)
    for _ in range(1100):  # each holds two
        alone.topology.duplicate("a copy").free()
    alone.free()


def test_two_communicators_at_once(comm: mpidl.Communicator) -> None:
    copy = duplicate(comm)
    pairs = [(comm, copy), (copy, comm)]
    first, second = pairs[comm.rank % 2]  # their calls may come in any order
    a, b = first.iallreduce(np.ones(2)), second.iallreduce(np.full(2, 2.0))
    values = {first: a, second: b}
    total = [float(sum((1 if c is pairs[r % 2][0] else 2) for r in range(comm.size))) for c in (comm, copy)]
    assert_same(values[copy].wait(), np.full(2, total[1]))
    assert_same(values[comm].wait(), np.full(2, total[0]))
    copy.free()


def test_mpi_was_started_for_all_threads() -> None:
    assert runtime.mpi_description()["thread_level"] == "multiple"
