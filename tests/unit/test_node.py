"""Collectives in shared memory with all ranks in this process, moved on in random order: every kind, dtype and
instruction set, against numpy. What real ranks do with them is in tests/mpi/test_shared_memory.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpidl.arrays import view
from mpidl.errors import ArgumentError, DtypeError
from mpidl.native import library, node

SETS = [name for code, name in enumerate(library.INSTRUCTIONS) if library.library().mpidl_supports(code)]
OPS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}
COUNTS = (1, 16, 63, 511, 512, 513, 1700)


@pytest.fixture(params=SETS)
def instructions(request: Any) -> Iterator[str]:
    before = library.library().mpidl_instructions()
    library.library().mpidl_use(library.INSTRUCTIONS.index(request.param))
    yield request.param
    library.library().mpidl_use(before)


class Ranks:
    """Several ends of one segment."""

    def __init__(self, size: int, piece: int = 192, small: int = 0) -> None:
        nbytes = node.segment_nbytes(size, small, piece)
        self.memory = np.zeros(nbytes + 64, np.uint8)
        address = self.memory.__array_interface__["data"][0]
        aligned = address + -address % 64
        sizes = {"small_nbytes": small, "piece_nbytes": piece, "spin": 0}
        self.ends = [node.end(aligned, rank, size, **sizes) for rank in range(size)]
        for rank, end in enumerate(self.ends):
            end.store_policy.wish = (rank + size) % 3  # past the caches or not, as others do or not
        self.dice = random.Random(size)
        self.calls = 0

    def run(self, jobs: list[Any]) -> list[int]:
        """Moves everybody's job on, in random order, until all have ended."""
        ended: dict[int, int] = {}
        while len(ended) < len(jobs):
            rank = self.dice.randrange(len(jobs))
            if rank not in ended:
                progress = node.advance(self.ends[rank], jobs[rank], 0)
                if progress != node.WAITING:
                    ended[rank] = progress
        return [ended[rank] for rank in range(len(jobs))]

    def reduce(self, kind: str, inputs: list[Any], op: str, outputs: list[Any], **options: Any) -> None:
        self.calls += 1
        count = outputs[0].count if kind == "reduce_scatter" else inputs[0].count
        jobs = [
            node.job((self.calls, 7), kind, x.dtype, count, (x.address, out.address), op=op, **options)
            for x, out in zip(inputs, outputs, strict=True)
        ]
        assert self.run(jobs) == [node.DONE] * len(jobs)


def values(rank: int, count: int, dtype: str) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(100 * rank + count)
    if dtype.startswith("int"):
        information = np.iinfo(dtype)
        return generator.integers(information.min, information.max, count, dtype)
    return (generator.standard_normal(count) * 10.0 ** generator.integers(-3, 3, count)).astype(dtype)


def in_rank_order(op: str, inputs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    wide = np.dtype("float32") if inputs[0].dtype == np.float16 else inputs[0].dtype
    total = inputs[0].astype(wide)
    with np.errstate(over="ignore"):
        for one in inputs[1:]:
            total = OPS[op](total, one.astype(wide))
        return total.astype(inputs[0].dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "int64"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_reductions_are_those_of_numpy_in_rank_order(instructions: str, size: int, dtype: str) -> None:
    for small in (0, 1 << 15):
        ranks = Ranks(size, small=small)
        for count in COUNTS:
            inputs = [values(rank, count, dtype) for rank in range(size)]
            for op in OPS:
                expected = in_rank_order(op, inputs)
                outputs = [np.zeros(count, dtype) for _ in inputs]
                ranks.reduce("allreduce", [view.view(x) for x in inputs], op, [view.view(out) for out in outputs])
                for out in outputs:
                    assert np.array_equal(out, expected), (instructions, op, count, small)


def test_a_mean_is_divided_before_it_is_rounded(instructions: str) -> None:
    ranks = Ranks(3)
    for dtype in ("float32", "float64", "float16"):
        inputs = [values(rank, 700, dtype) for rank in range(3)]
        wide = [x.astype("float32" if dtype == "float16" else dtype) for x in inputs]
        expected = ((wide[0] + wide[1] + wide[2]) / 3).astype(dtype)
        outputs = [np.zeros(700, dtype) for _ in inputs]
        views = [view.view(x) for x in inputs], [view.view(out) for out in outputs]
        ranks.reduce("allreduce", views[0], "sum", views[1], divisor=3.0)
        assert all(np.array_equal(out, expected) for out in outputs)


def test_bfloat16_is_added_in_float32_and_rounded_to_nearest(instructions: str) -> None:
    torch = pytest.importorskip("torch")
    ranks = Ranks(4)
    inputs = [torch.from_numpy(values(rank, 900, "float32")).bfloat16() for rank in range(4)]
    expected = ((inputs[0].float() + inputs[1].float()) + inputs[2].float() + inputs[3].float()).bfloat16()
    outputs = [torch.zeros(900, dtype=torch.bfloat16) for _ in inputs]
    ranks.reduce("allreduce", [view.view(x) for x in inputs], "sum", [view.view(out) for out in outputs])
    assert all(torch.equal(out, expected) for out in outputs)


def test_every_kind(instructions: str) -> None:
    size, count = 4, 333
    for small in (0, 1 << 15):
        ranks = Ranks(size, small=small)
        blocks = [values(rank, size * count, "float64") for rank in range(size)]
        whole = in_rank_order("sum", blocks)
        outputs = [np.zeros(count) for _ in blocks]
        ranks.reduce("reduce_scatter", [view.view(x) for x in blocks], "sum", [view.view(o) for o in outputs])
        assert all(np.array_equal(out, whole[r * count : (r + 1) * count]) for r, out in enumerate(outputs))
        outputs = [np.zeros(size * count) for _ in blocks]
        ranks.reduce("reduce", [view.view(x) for x in blocks], "sum", [view.view(o) for o in outputs], root=2)
        assert np.array_equal(outputs[2], whole)
        assert not any(out.any() for rank, out in enumerate(outputs) if rank != 2)
        mine = [values(rank, count, "float64") for rank in range(size)]
        outputs = [np.zeros(size * count) for _ in blocks]
        ranks.reduce("allgather", [view.view(x) for x in mine], "sum", [view.view(o) for o in outputs])
        assert all(np.array_equal(out, np.concatenate(mine)) for out in outputs)
        copies = [mine[1].copy() if rank == 1 else np.zeros(count) for rank in range(size)]
        ranks.reduce("broadcast", [view.view(x) for x in copies], "sum", [view.view(x) for x in copies], root=1)
        assert all(np.array_equal(copy, mine[1]) for copy in copies)


def test_the_last_blocks_may_be_shorter_or_empty(instructions: str) -> None:
    size, count = 4, 100
    for small in (0, 1 << 15):
        ranks = Ranks(size, small=small)
        for total in (1, 99, 100, 101, 250, 400):
            whole = [values(rank, total, "float64") for rank in range(size)]
            expected = in_rank_order("sum", whole)
            outputs = [np.zeros(count) for _ in whole]
            blocks(ranks, "reduce_scatter", count, total, whole, outputs)
            results = [np.zeros(total + 1) for _ in whole]
            blocks(ranks, "allgather", count, total, outputs, results)
            for rank, out in enumerate(outputs):
                mine = expected[rank * count : (rank + 1) * count]
                assert np.array_equal(out[: len(mine)], mine), (small, total)
                assert not out[len(mine) :].any(), (small, total)
            for result in results:
                assert np.array_equal(result[:total], expected), (small, total)
                assert result[total] == 0


def blocks(ranks: Ranks, kind: str, count: int, total: int, inputs: list[Any], outputs: list[Any]) -> None:
    ranks.calls += 1
    addresses = [(x.ctypes.data, out.ctypes.data) for x, out in zip(inputs, outputs, strict=True)]
    jobs = [node.job((ranks.calls, 7), kind, "float64", count, pair, total=total) for pair in addresses]
    assert ranks.run(jobs) == [node.DONE] * len(jobs)


def test_memory_of_one_rank_is_reduced_alike(instructions: str) -> None:
    inputs = [values(rank, 1000, "float32") for rank in range(3)]
    expected = in_rank_order("sum", inputs) / np.float32(3)
    out = np.zeros(1000, np.float32)
    node.reduce([x.ctypes.data for x in inputs], out.ctypes.data, 1000, dtype="float32", op="sum", divisor=3.0)
    assert np.array_equal(out, expected)
    node.reduce(
        [x.ctypes.data for x in inputs], inputs[1].ctypes.data, 1000, dtype="float32", op="sum", divisor=3.0
    )  # in place
    assert np.array_equal(inputs[1], expected)  # in place
    with pytest.raises(DtypeError):
        node.reduce([out.ctypes.data], out.ctypes.data, 4, dtype="uint8", op="sum")
    with pytest.raises(ArgumentError):
        node.reduce([], out.ctypes.data, 4, dtype="float32", op="sum")


def test_results_past_the_caches_are_the_same(instructions: str) -> None:
    count = (1 << 22) + 37  # 16 MiB and a little: written by streaming stores
    ranks = Ranks(2, piece=1 << 18)
    inputs = [np.arange(count, dtype=np.float32) % 1000 + rank for rank in range(2)]
    memory = [np.zeros(count + 5, np.float32) for _ in inputs]
    outputs = [one[3 : count + 3] for one in memory]  # not at the start of a cache line
    ranks.reduce("allreduce", [view.view(x) for x in inputs], "sum", [view.view(out) for out in outputs])
    for whole, out in zip(memory, outputs, strict=True):
        assert np.array_equal(out, inputs[0] + inputs[1])
        assert not whole[:3].any()
        assert not whole[count + 3 :].any()


def test_a_call_that_differs_is_seen_by_all_and_the_next_one_works() -> None:
    ranks = Ranks(3)
    for odd in range(3):
        jobs = [node.job((1, 8 if rank == odd else 7), "agree", "uint8", 0) for rank in range(3)]
        assert ranks.run(jobs) == [node.DIFFERS] * 3
        x = [np.full(50, rank, np.float32) for rank in range(3)]
        ranks.reduce("allreduce", [view.view(one) for one in x], "sum", [view.view(one) for one in x])
        assert all((one == 3).all() for one in x)


def test_what_makes_no_sense_is_refused_before_anything_is_sent() -> None:
    ranks = Ranks(2)
    x = view.view(np.zeros(4, np.uint8))
    for job, error in (
        (node.job((1, 1), "allreduce", "uint8", 4, (x.address, x.address)), DtypeError),
        (node.job((1, 1), "broadcast", "uint8", 4, (x.address, x.address), root=2), ArgumentError),
        (node.job((1, 1), "broadcast", "uint8", -1, (x.address, x.address)), ArgumentError),
    ):
        with pytest.raises(error):
            node.advance(ranks.ends[0], job, 0)
    assert ranks.ends[0].calls == 0
    assert node.segment_nbytes(2, 0, 63) == 0
    assert node.segment_nbytes(0, 0, 64) == 0
