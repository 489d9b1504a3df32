"""Collectives in memory that ranks share: equal bits however data are cut, in place, unaligned, scattered."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known import named_segments

import mpidl
from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.collectives import Call, GatherList, RunningTask, dispatch, operations
from mpidl.mpi import shared_memory

WITH_OTHERS = True
ANY_MPI = True
SIZES = (2, 3, 4)
PIECES = (64, 192, 4096)  # bytes of a slice: the data below take from one turn to hundreds
COUNTS = (1, 15, 16, 17, 100, 1000, 5000)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes collectives whose slices have so many bytes; with `small` bytes beside the words."""

    def make(comm: mpidl.Communicator, piece: int, small: int = 0) -> dispatch.Collectives:
        segment = shared_memory.make_segment
        monkeypatch.setattr(shared_memory, "make_segment", lambda ranks: segment(ranks, small=small, piece=piece))
        made = dispatch.Collectives(comm.topology)
        monkeypatch.undo()
        assert made.node is not None
        return made

    return make


def done(steps: Any) -> None:
    driven = RunningTask(steps)
    while not driven.tried():
        pass


def uneven(rank: int, count: int, dtype: str) -> torch.Tensor:
    """Values whose sum depends on the order in which they are added."""
    generator = torch.Generator().manual_seed(rank)
    if dtype.startswith("int"):
        return torch.randint(-(2**30), 2**30, (count,), generator=generator, dtype=getattr(torch, dtype))
    return torch.randn(count, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


def in_rank_order(size: int, count: int, dtype: str, op: str) -> torch.Tensor:
    wide = torch.float32 if dtype in ("float16", "bfloat16") else getattr(torch, dtype)
    total = uneven(0, count, dtype).to(wide)
    for rank in range(1, size):
        value = uneven(rank, count, dtype).to(wide)
        total = {"sum": torch.add, "mean": torch.add, "prod": torch.mul, "min": torch.minimum, "max": torch.maximum}[
            op
        ](total, value)
    return (total / size if op == "mean" else total).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_rank_order_however_the_data_are_cut(comm: mpidl.Communicator, cut: Any, dtype: str):
    for piece, small in [*((piece, 0) for piece in PIECES), (4096, 1 << 16)]:
        ranks = cut(comm, piece, small)
        for count in COUNTS:
            for op in ("sum", "mean", "min", "max", "prod"):
                if op == "mean" and dtype.startswith("int"):
                    continue
                expected = in_rank_order(comm.size, count, dtype, op)
                send, receive = uneven(comm.rank, count, dtype), torch.zeros(count, dtype=expected.dtype)
                call = Call("allreduce", f"{op} {count}")
                done(ranks.allreduce(call, view.view(send), view.view(receive), op))
                assert torch.equal(receive, expected), (piece, count, op)
                done(ranks.allreduce(call, view.view(send), view.view(send), op))  # in place
                assert torch.equal(send, expected), (piece, count, op)


def test_any_alignment(comm: mpidl.Communicator, cut: Any):
    ranks = cut(comm, 192)
    expected = in_rank_order(comm.size, 1000, "float32", "sum").numpy()
    for shift in (1, 2, 3, 5):
        raw, out = (np.zeros(4008, np.uint8) for _ in range(2))
        memory, result = (array[shift : shift + 4000].view(np.float32) for array in (raw, out))
        memory[:] = uneven(comm.rank, 1000, "float32").numpy()
        done(ranks.allreduce(Call("allreduce"), view.view(memory), view.view(result), "sum"))
        assert np.array_equal(result, expected)
        assert not out[:shift].any()
        assert not out[shift + 4000 :].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_scattered_input_is_scaled_cast_and_added(comm: mpidl.Communicator, cut: Any, dtype: str):
    counts = (7, 0, 300, 1, 64, 128)
    offsets = tuple(int(n) for n in np.cumsum([0, *counts[:-1]]))
    wide = "float64" if dtype == "float64" else "float32"

    def parts(rank: int) -> list[torch.Tensor]:
        return [uneven(10 * rank + i, count, dtype) for i, count in enumerate(counts)]

    def flat(rank: int) -> torch.Tensor:
        pieces = parts(rank)
        pieces[(2 + rank) % 4] = torch.zeros(counts[(2 + rank) % 4], dtype=pieces[0].dtype)  # each rank leaves one out
        return torch.cat(pieces).to(getattr(torch, wide)) * (rank + 1)

    expected = flat(0)
    for rank in range(1, comm.size):
        expected += flat(rank)
    mine = parts(comm.rank)
    for ranks in (*(cut(comm, piece) for piece in PIECES), cut(comm, 64, 1 << 16)):
        addresses = [one.data_ptr() for one in mine]
        addresses[(2 + comm.rank) % 4] = 0
        source = GatherList(Table(counts, offsets), addresses, dtype, float(comm.rank + 1), mine)
        receive = view.empty_flat(sum(counts), wide)
        request = ranks.start_gathered_sum((1, 2), source, receive, 2)
        while not request.tried():
            pass
        assert torch.equal(torch.from_numpy(view.as_numpy(receive)), expected / 2)
        assert request.finite


def test_what_is_not_finite_is_seen_by_the_rank_that_brought_it(comm: mpidl.Communicator, cut: Any):
    for dtype, worst in (("float32", float("inf")), ("float32", float("nan")), ("float64", 1e300)):
        mine = torch.ones(500, dtype=getattr(torch, dtype))
        if comm.rank == 1:
            mine[321] = worst
        source = GatherList(Table((500,), (0,)), [mine.data_ptr()], dtype, 1.0, mine)
        request = cut(comm, 64).start_gathered_sum((1, 2), source, view.empty_flat(500, dtype), 1)
        while not request.tried():
            pass
        assert request.finite == (comm.rank != 1 or worst == 1e300)


def test_without_room_every_rank_gets_the_error_and_can_go_on(comm: mpidl.Communicator, monkeypatch: Any):
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if comm.rank == comm.size - 1:
        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(mpidl.SharedMemoryError, match=r"no room for the \d+\.\d MiB .*MPIDL_SHARED_MEMORY=0"):
        shared_memory.make_segment(comm.topology)
    monkeypatch.undo()
    assert comm.allreduce(np.ones(3))[0] == comm.size


def test_ranks_that_do_not_see_the_same_folder_do_without(comm: mpidl.Communicator, monkeypatch: Any, tmp_path: Path):
    if comm.rank == 1:
        real = shared_memory._attempt
        monkeypatch.setattr(shared_memory, "_attempt", lambda path, *rest: real(tmp_path / path.name, *rest))
    assert shared_memory.make_segment(comm.topology) is None


def test_nothing_is_left_in_the_folder(comm: mpidl.Communicator, cut: Any):
    cut(comm, 64)
    assert not named_segments(comm)


def test_the_switch_takes_0_and_1_only(comm: mpidl.Communicator, monkeypatch: Any):
    monkeypatch.setenv("MPIDL_SHARED_MEMORY", "yes")
    with pytest.raises(mpidl.ArgumentError, match="MPIDL_SHARED_MEMORY='yes': expected 0"):
        mpidl.Communicator(comm.topology.data)
    monkeypatch.setenv("MPIDL_SHARED_MEMORY", "0")
    copy = mpidl.Communicator(comm.topology.data)
    assert copy.allreduce(np.ones(3))[0] == comm.size
    copy.free()


def test_a_setting_on_one_rank_only_holds_for_all(comm: mpidl.Communicator, monkeypatch: Any):
    monkeypatch.setenv("MPIDL_SHARED_MEMORY", "0" if comm.rank == 1 else "1")
    copy = mpidl.Communicator(comm.topology.data)
    assert not copy.shares_memory
    assert copy.allreduce(np.ones(3))[0] == comm.size
    copy.free()
    monkeypatch.setenv("MPIDL_SHARED_MEMORY", "yes" if comm.rank == 1 else "1")
    with pytest.raises(
        mpidl.ArgumentError, match="expected 0" if comm.rank == 1 else "rank 1 refused its MPIDL_SHARED"
    ):
        mpidl.Communicator(comm.topology.data)
    assert comm.allreduce(np.ones(3))[0] == comm.size


def test_plain_arrays_take_the_quick_way(comm: mpidl.Communicator, monkeypatch: Any):
    monkeypatch.setattr(operations, "allreduce", lambda *_: pytest.fail("the long way was taken"))
    for dtype in ("float32", "float64", "float16", "int32", "int64"):
        for count in (1, 100, 100_000):
            x = np.full(count, comm.rank + 1, dtype)
            out = np.zeros_like(x)
            for op, expected in (("sum", comm.size * (comm.size + 1) // 2), ("min", 1), ("max", comm.size)):
                assert comm.allreduce(x, op, out=out) is out
                assert (out == expected).all()
            assert comm.allreduce(x, out=x) is x  # in place
            assert (x == comm.size * (comm.size + 1) // 2).all()
    mean = comm.allreduce(np.full(3, float(comm.rank)), "mean", out=np.zeros(3))
    assert (mean == (comm.size - 1) / 2).all()


def test_the_quick_way_waits_and_says_what_differs(comm: mpidl.Communicator):
    x, out = np.ones(10, np.float32), np.zeros(10, np.float32)
    for _ in range(2):
        with pytest.raises(mpidl.MismatchError, match=r"op='max'.*op='sum'|op='sum'.*op='max'"):
            comm.allreduce(x, "max" if comm.rank == 1 else "sum", out=out)
        if comm.rank == 1:
            time.sleep(0.3)  # the others wait longer than the quick way does
        assert (comm.allreduce(x, out=out) == comm.size).all()


def test_what_is_not_plain_is_refused_or_taken_as_before(comm: mpidl.Communicator):
    x = np.arange(20.0)
    fixed = np.zeros(10)
    fixed.setflags(write=False)
    with pytest.raises(mpidl.ArgumentError, match="read-only"):
        comm.allreduce(x[:10], out=fixed)
    with pytest.raises(mpidl.ArgumentError, match="shape"):
        comm.allreduce(x[:10], out=np.zeros(11))
    with pytest.raises(mpidl.ArgumentError, match="op is 'median'"):
        comm.allreduce(x[:10], "median", out=np.zeros(10))
    strided = np.zeros(20)[::2]
    assert (comm.allreduce(x[::2] if comm.rank else x[:20:2].copy(), out=strided) == comm.size * x[::2]).all()
    overlapping = np.arange(12.0)
    result = comm.allreduce(overlapping[:10], out=overlapping[2:])
    assert (result == comm.size * np.arange(10.0)).all()
