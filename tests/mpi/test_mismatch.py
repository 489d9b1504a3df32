"""Calls that differ between ranks: all get one text that names both sides, and the communicator works afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from known import assert_same

import mpidl

WITH_OTHERS = True
SIZES = (2, 3, 4)

Call = Callable[[mpidl.Communicator], Any]
X = np.ones(4, np.float32)


def text_of(comm: mpidl.Communicator, call: Call, error: type[Exception] = mpidl.MismatchError) -> str:
    with pytest.raises(error) as caught:
        call(comm)
    assert type(caught.value) is error
    return str(caught.value)


def texts(comm: mpidl.Communicator, text: str) -> list[str]:
    """Every rank's text; also shows that the communicator still works."""
    assert_same(comm.allreduce(X), np.full(4, comm.size, np.float32))
    row = np.zeros(2000, np.uint8)
    raw = text.encode()
    row[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [found.tobytes().rstrip(b"\0").decode() for found in comm.allgather(row)]


def ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}:"


@pytest.mark.parametrize(
    ("one", "others", "one_says", "others_say"),
    [
        (lambda c: c.allreduce(X), lambda c: c.allreduce(X, op="max"), "op='sum'", "op='max'"),
        (lambda c: c.allreduce(X), lambda c: c.allreduce(X.astype("int32")), "float32", "int32"),
        (lambda c: c.allreduce(X), lambda c: c.allreduce(X[:3]), "count 4", "count 3"),
        (lambda c: c.allreduce(X[:0]), lambda c: c.allreduce(X), "count 0", "count 4"),
        (lambda c: c.broadcast(X.copy(), root=0), lambda c: c.broadcast(X.copy(), root=1), "root 0", "root 1"),
        (lambda c: c.reduce(X, root=1), lambda c: c.reduce(X, root=0), "root 1", "root 0"),
        (lambda c: c.allreduce(X), lambda c: c.allgather(X), "allreduce(", "allgather("),
        (lambda c: c.barrier(), lambda c: c.reduce(X), "barrier(", "reduce("),
        (lambda c: c.alltoall(np.ones(24)), lambda c: c.alltoall(np.ones(12)), "count 24", "count 12"),
        (lambda c: c.reduce_scatter(np.ones(24)), lambda c: c.reduce_scatter(np.ones(12)), "count 24", "count 12"),
        (lambda c: c.allgather(X), lambda c: c.allgather(X.view("int32")), "float32", "int32"),
        (lambda c: c.iallreduce(X).wait(), lambda c: c.iallreduce(X, op="min").wait(), "op='sum'", "op='min'"),
    ],
)
def test_all_ranks_get_one_text_that_names_both_sides(
    comm: mpidl.Communicator, one: Call, others: Call, one_says: str, others_say: str
) -> None:
    for odd in range(comm.size):
        text = text_of(comm, one if comm.rank == odd else others)
        assert texts(comm, text) == [text] * comm.size
        sides = text.split(" differs between ranks: ")[1].split("; ")
        assert len(sides) == 2
        by_rank = {side.partition(":")[0] + ":": side for side in sides}
        assert one_says in by_rank[ranks([odd])]
        assert others_say in by_rank[ranks([r for r in range(comm.size) if r != odd])]


def test_every_rank_differs(comm: mpidl.Communicator) -> None:
    text = text_of(comm, lambda c: c.allreduce(np.ones(c.rank)))
    assert texts(comm, text) == [text] * comm.size
    for rank in range(comm.size):
        assert f"rank {rank}: allreduce(op='sum', float64, count {rank})" in text


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (lambda c: c.allreduce(X, op="average"), mpidl.ArgumentError, "op is 'average'"),
        (lambda c: c.allreduce([1.0]), mpidl.DtypeError, "x must be a numpy array"),
        (lambda c: c.allreduce(X, out=np.ones(5, np.float32)), mpidl.ArgumentError, "out has shape"),
        (lambda c: c.broadcast(X, root=99), mpidl.ArgumentError, "root is 99"),
    ],
)
def test_one_rank_refuses_its_arguments(comm: mpidl.Communicator, bad: Call, error: type[Exception], says: str) -> None:
    culprit = comm.size - 1
    if comm.rank == culprit:
        text = text_of(comm, bad, error)
        assert says in text
    else:
        text = text_of(comm, lambda c: c.allreduce(X))
        assert f"rank {culprit}: " in text
        assert f"refused its arguments: {error.__name__}: " in text
        assert says in text
    others = [found for rank, found in enumerate(texts(comm, text)) if rank != culprit]
    assert len(set(others)) == 1


def test_a_mismatch_is_never_cached(comm: mpidl.Communicator) -> None:
    """The same shapes were reduced before, so that a check made once per shape would let this one through."""
    for _ in range(3):
        assert_same(comm.allreduce(X), np.full(4, comm.size, np.float32))
    other = X.astype("int32")
    assert_same(comm.allreduce(other), np.full(4, comm.size, np.int32))
    text = text_of(comm, lambda c: c.allreduce(X if c.rank else other))
    assert texts(comm, text) == [text] * comm.size


def test_only_the_call_that_differs_fails(comm: mpidl.Communicator) -> None:
    requests = [comm.iallreduce(X * k, op="max" if k == 2 and comm.rank == 1 else "sum") for k in range(1, 5)]
    for k, request in enumerate(requests, 1):
        if k == 2:
            with pytest.raises(mpidl.MismatchError, match="op='max'"):
                request.wait()
        else:
            assert_same(request.wait(), X * k * comm.size)
