"""Calls of ranks on several nodes (pretended: MPIDL_NODE_SIZE), by every algorithm, against whole numbers."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mpidl
from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.collectives import Collectives, GatherList, cost_model
from mpidl.collectives.lanes import pipeline, transport
from mpidl.mpi import exit_protocol
from mpidl.mpi.topology import Topology

WITH_OTHERS = True
RANKS = (4, 8)
SIZES = (3, 4, 5, 8)
pytestmark = pytest.mark.whole_product  # some of it is skipped
COUNTS = (1, 63, 1500)
SHOWN = ((3, 1), (5, 1), (5, 3), (8, 2))  # ranks, and ranks of a node, that show nothing that others do not
EXCHANGES = ("direct", "halving_doubling")
_copies: dict[tuple[int, int], mpidl.Communicator] = {}


@pytest.fixture(params=(1, 2, 3), ids=lambda size: f"nodes-of-{size}")
def node_size(request: Any) -> int:
    return int(request.param)


@pytest.fixture
def comm(comm: mpidl.Communicator, node_size: int, monkeypatch: pytest.MonkeyPatch) -> mpidl.Communicator:
    """A copy, made once, whose ranks lie on several nodes; slices are so small that a call takes many segments."""
    monkeypatch.setattr(pipeline, "SLICE", 512)
    if node_size >= comm.size:
        pytest.skip("one node")
    if comm.size <= RANKS[0] < int(os.environ["MPIDL_TESTS_RANKS"]) or (comm.size, node_size) in SHOWN:
        pytest.skip("shown by others")
    key = comm.size, node_size
    if key not in _copies:
        monkeypatch.setenv("MPIDL_NODE_SIZE", str(node_size))
        _copies[key] = mpidl.Communicator(comm.topology.data)
    return _copies[key]


@pytest.fixture(params=EXCHANGES)
def algorithm(request: Any, comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch) -> str:
    test, directly = request.function, request.param == "direct"
    one_way = test in (test_every_rank_gets_all_blocks, test_every_rank_gets_the_roots_data)
    if one_way and (not directly or comm.size == RANKS[1]):
        pytest.skip("it has one way only, shown by fewer ranks")
    few = directly and not (one_way or test is test_every_rank_gets_the_reduction)
    if (few and comm.size > RANKS[0]) or (test is test_every_rank_gets_its_block and comm.size == RANKS[1]):
        pytest.skip("shown by fewer ranks")
    monkeypatch.setattr(cost_model, "choose", lambda *_, **__: request.param)
    return str(request.param)


def values(rank: int, count: int, dtype: str) -> np.ndarray[Any, Any]:
    return ((np.arange(count) * 7 + rank * 3) % 11 + 1).astype(dtype)


def test_every_rank_gets_the_reduction(comm: mpidl.Communicator, algorithm: str):
    for dtype in ("float32", "float64", "int32", "int64", "float16"):
        for count in COUNTS:
            inputs = [values(rank, count, dtype) for rank in range(comm.size)]
            for op, function in (("sum", np.add), ("min", np.minimum), ("max", np.maximum)):
                assert np.array_equal(comm.allreduce(inputs[comm.rank], op), function.reduce(inputs)), (dtype, op)
            x = inputs[comm.rank].copy()
            assert np.array_equal(comm.allreduce(x, out=x), np.add.reduce(inputs))  # in place


@contextmanager
def calls_on_lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is started on lanes meanwhile."""
    started: list[Any] = []
    real = pipeline.Lanes.start
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.Lanes, "start", lambda self, stages: (started.append(stages), real(self, stages))[1])
        yield started


def test_every_rank_gets_its_block(comm: mpidl.Communicator, algorithm: str, monkeypatch: pytest.MonkeyPatch):
    even = len(set(Counter(comm.topology.placement.nodes).values())) == 1
    for dtype in ("float32", "int64", "float16"):
        for share in (0, 1, 63, 500):
            inputs = [values(rank, share * comm.size, dtype) for rank in range(comm.size)]
            for op, function in (("sum", np.add), ("max", np.maximum)):
                with calls_on_lanes(monkeypatch) as started:
                    found = comm.reduce_scatter(inputs[comm.rank], op)
                assert np.array_equal(found, function.reduce(inputs)[comm.rank * share :][:share]), (dtype, share, op)
                assert len(started) == even  # others are left to MPI
    x = torch.randn(comm.size * 100, generator=torch.Generator().manual_seed(comm.rank))
    if even:  # in the order of an allreduce
        assert torch.equal(comm.reduce_scatter(x, "mean"), comm.allreduce(x, "mean")[comm.rank * 100 :][:100])


def test_every_rank_gets_all_blocks(comm: mpidl.Communicator, algorithm: str, monkeypatch: pytest.MonkeyPatch):
    for dtype in ("uint8", "bool", "complex64", "float64"):
        for count in (0, 1, 130, 700):
            inputs = [values(rank, count, "int64").astype(dtype) for rank in range(comm.size)]
            with calls_on_lanes(monkeypatch) as started:
                found = comm.allgather(inputs[comm.rank])
            assert np.array_equal(found, np.stack(inputs)), (dtype, count)
            assert len(started) == 1
    half = torch.full((33, 2), comm.rank + 0.5, dtype=torch.bfloat16)
    assert torch.equal(comm.allgather(half)[:, 0, 0], torch.arange(comm.size, dtype=torch.bfloat16) + 0.5)


def test_every_rank_gets_the_roots_data(comm: mpidl.Communicator, algorithm: str, monkeypatch: pytest.MonkeyPatch):
    for dtype in ("uint8", "bool", "complex64", "float64"):
        for count in (0, 1, 130, 700):
            for root in {0, comm.size // 2, comm.size - 1}:
                x = values(comm.rank, count, "int64").astype(dtype)
                x.flags.writeable = comm.rank != root
                with calls_on_lanes(monkeypatch) as started:
                    comm.broadcast(x, root)
                assert np.array_equal(x, values(root, count, "int64").astype(dtype)), (dtype, count, root)
                assert len(started) == 1


def test_ranks_of_a_node_need_not_follow_each_other(comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch):
    if (comm.size, comm.nodes) != (4, 2):
        pytest.skip("shown by 4 ranks")
    if len({process.visible for process in comm.topology.placement.processes}) > 1:
        pytest.skip("ranks that really are on two nodes cannot change places")
    monkeypatch.setattr(cost_model, "choose", lambda *_, **__: "direct")
    placement = replace(comm.topology.placement, nodes=(0, 1, 0, 1))
    topology = Topology(comm.topology._mpi, comm.topology.data, "by turns", placement)
    ranks = mpidl.Communicator._over(topology)
    inputs = [values(rank, 4000, "float64") for rank in range(4)]
    with calls_on_lanes(monkeypatch) as started:
        assert np.array_equal(ranks.reduce_scatter(inputs[ranks.rank]), sum(inputs)[ranks.rank * 1000 :][:1000])
        assert len(started) == 1
        assert np.array_equal(ranks.allgather(inputs[ranks.rank]), np.stack(inputs))
        assert len(started) == 1  # a node's blocks do not lie side by side: MPI brings them
    ranks.free()


def test_means_and_bits(comm: mpidl.Communicator, algorithm: str):
    rows = [torch.randn(3001, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.size)]
    found = comm.allreduce(rows[comm.rank], "mean")
    assert torch.allclose(found, torch.stack(rows).mean(0), atol=1e-6)
    everyone = comm.allgather(found)
    assert all(torch.equal(row, everyone[0]) for row in everyone)


def test_several_at_a_time_end_in_order(comm: mpidl.Communicator, algorithm: str):
    ranks = Collectives(comm.topology)
    memory = [(np.full(2000 + 100 * i, comm.rank + i, np.float64), np.empty(2000 + 100 * i)) for i in range(5)]
    started = [ranks.start_sum((9, i), view.view(x), view.view(out), 1) for i, (x, out) in enumerate(memory)]
    for request in reversed(started):
        while not request.tried():
            pass
    for i, (_, out) in enumerate(memory):
        assert (out == comm.size * i + comm.size * (comm.size - 1) // 2).all()


@pytest.mark.parametrize("wire_dtype", ["", "bfloat16"])
def test_scattered_gradients(comm: mpidl.Communicator, algorithm: str, wire_dtype: str):
    counts = (7, 0, 300, 1, 64, 1280)
    offsets = tuple(int(n) for n in np.cumsum([0, *counts[:-1]]))
    parts = [torch.from_numpy(values(comm.rank + i, count, "float32")) for i, count in enumerate(counts)]
    addresses = [0 if i == 2 else part.data_ptr() for i, part in enumerate(parts)]
    expected = np.concatenate(
        [
            sum(values(rank + i, count, "float32") for rank in range(comm.size)) * (i != 2)
            for i, count in enumerate(counts)
        ]
    )
    ranks = Collectives(comm.topology, wire_dtype=wire_dtype)
    out = np.empty(sum(counts), np.float32)
    source = GatherList(Table(counts, offsets), addresses, "float32", 1.0, parts)
    request = ranks.start_gathered_sum((1, 2), source, view.view(out), 1)
    while not request.tried():
        pass
    assert np.array_equal(out, expected)  # sums of up to 8 x 11 are exact in bfloat16
    assert request.finite
    if comm.rank == comm.size - 1:
        parts[5][700] = float("nan")
    request = ranks.start_gathered_sum((1, 3), source, view.view(out), 1)
    while not request.tried():
        pass
    assert np.isnan(out).sum() == 1
    assert request.finite == (comm.rank != comm.size - 1)


def test_the_link_is_measured_once_and_known_to_all(comm: mpidl.Communicator):
    link = cost_model.link_of(comm.topology)
    assert link.latency > 0
    assert link.per_byte > 0
    duplicate = comm.topology.duplicate("a duplicate")
    assert duplicate.link is link
    duplicate.free()
    words = comm.allgather(np.array([link.latency, link.per_byte]))
    assert (words == words[0]).all()


def test_deterministic_choices_ask_no_link(comm: mpidl.Communicator, node_size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPIDL_NODE_SIZE", str(node_size))
    monkeypatch.setenv("MPIDL_DETERMINISTIC", "1" if comm.rank == 1 else "")  # one rank's wish holds for all
    copy = mpidl.Communicator(comm.topology.data)
    assert copy.topology.link == cost_model._USUAL
    copy.free()
    monkeypatch.setenv("MPIDL_DETERMINISTIC", "maybe" if comm.rank == 1 else "")
    with pytest.raises(mpidl.ArgumentError, match="'maybe'" if comm.rank == 1 else "rank 1 refused its MPIDL_DETERM"):
        mpidl.Communicator(comm.topology.data)


def test_a_forced_algorithm_is_taken(comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch):
    for forced, expected in (("mpi", 0), ("direct", 1), ("halving_doubling", 1)):
        monkeypatch.setattr(comm._collectives, "forced", forced)
        with calls_on_lanes(monkeypatch) as taken:
            assert (comm.allreduce(np.ones(10)) == comm.size).all()
        assert len(taken) == expected


def test_calls_under_way_keep_their_number_whatever_begins_meanwhile(comm: mpidl.Communicator, algorithm: str):
    x = np.full(3000, comm.rank + 1.0)
    request = comm.iallreduce(x)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:  # so that some ranks are past the agreement, and others only let MPI go on
        if comm.rank % 2:
            request.test()
        else:
            comm.topology.data.Iprobe()
    duplicate = comm.topology.duplicate("begins calls of its own")
    assert (request.wait() == comm.size * (comm.size + 1) / 2).all()
    duplicate.free()


def test_an_interrupt_half_way_leaves_no_message_to_be_taken_for_another(
    comm: mpidl.Communicator, algorithm: str, monkeypatch: pytest.MonkeyPatch
):
    topology = comm.topology.duplicate("is given up")
    ranks = Collectives(topology)
    x, out = view.view(np.ones(3000)), view.view(np.empty(3000))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transport.Transport, "send", interrupt)
    interrupted, until = False, time.monotonic() + 1
    try:
        request = ranks.start_sum((1, 1), x, out, 1)
        while time.monotonic() < until:
            assert not request.tried()  # whoever is not interrupted waits for one that is
    except KeyboardInterrupt:
        interrupted = True
        with pytest.raises(mpidl.ClosedError, match="an allreduce across nodes was given up half-way"):
            topology.begin()
    monkeypatch.undo()
    assert comm.allreduce(np.array([int(interrupted)]), "max")[0]
    exit_protocol._open.clear()  # what was given up would end the job when this rank leaves
    comm.barrier()


def test_gradients_are_let_go_when_they_have_been_reduced(comm: mpidl.Communicator, algorithm: str):
    model = torch.nn.Linear(100, 10)
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    assert model.weight.grad is not None
    address = model.weight.grad.data_ptr()
    optimizer.zero_grad()
    gc.collect()
    assert not [
        one
        for one in gc.get_objects()
        if type(one) is torch.Tensor and torch._C._has_storage(one) and one.data_ptr() == address
    ]
    optimizer.finish()


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_gradients_of_a_model(comm: mpidl.Communicator, algorithm: str, wire_dtype: torch.dtype | None):
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mpidl.Synchronous(inner, model, comm=comm, bucket_cap_mb=0.001, wire_dtype=wire_dtype)
    batches = [torch.randn(8, 30, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.size)]
    alone = [torch.autograd.grad(model(x).square().mean(), list(model.parameters())) for x in batches]
    for _ in range(2):
        optimizer.zero_grad()
        model(batches[comm.rank]).square().mean().backward()
        for parameter, gradients in zip(model.parameters(), zip(*alone, strict=True), strict=True):
            assert parameter.grad is not None
            tolerance = 1e-6 if wire_dtype is None else 0.03 * float(torch.stack(gradients).abs().max())
            assert torch.allclose(parameter.grad, torch.stack(gradients).mean(0), rtol=0, atol=tolerance)
            everyone = comm.allgather(parameter.grad)
            assert all(torch.equal(one, everyone[0]) for one in everyone)
    optimizer.finish()


def test_a_wire_dtype_that_cannot_be_is_refused(comm: mpidl.Communicator):
    model = torch.nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mpidl.ArgumentError, match=r"wire_dtype=torch\.float16; expected None or torch\.bfloat16"):
        mpidl.Synchronous(inner, model, comm=comm, wire_dtype=torch.float16)
