"""How a center is held: what users say, what a trial finds, and active messages between pretended nodes."""

from __future__ import annotations

import ctypes
import dataclasses
import time

import numpy as np
import pytest

from mpidl.errors import ArgumentError, ClosedError
from mpidl.mpi import exit_protocol
from mpidl.one_sided.active_message import AFTER, AHEAD, HEADER, PIECE, READ, ActiveMessage
from mpidl.one_sided.message_server import MessageServer
from mpidl.one_sided.window import Plan
from mpidl.parameter_server.center import center as servers
from mpidl.parameter_server.center import protocol
from mpidl.parameter_server.center.center import Center, Requirements
from mpidl.parameter_server.center.progress_thread import Progress

WITH_OTHERS = True


@pytest.fixture
def ranks(world_comm):
    made = world_comm.topology.duplicate("test of the protocols")
    yield made
    made.free()


@pytest.fixture
def far_ranks(ranks):
    """The same as if the second half of them were on another node."""
    half = (ranks.size + 1) // 2
    nodes = tuple(int(rank >= half) for rank in range(ranks.size))
    ranks.placement = dataclasses.replace(ranks.placement, nodes=nodes)
    return ranks


def never(*_):
    pytest.fail("a trial was made")


def test_what_the_user_says_is_done_or_refused_alike(ranks, monkeypatch):
    last = ranks.rank == ranks.size - 1
    for wish in (protocol.RMA, protocol.ACTIVE_MESSAGE):
        monkeypatch.setenv(protocol.SWITCH, wish)
        assert protocol.choose(ranks, ranks, never) == wish
    for wish in ("mail", "mail" if last else "active_message"):  # the name in mpidl 0.1, an alias
        monkeypatch.setenv(protocol.SWITCH, wish)
        assert protocol.choose(ranks, ranks, never) == "active_message"
    monkeypatch.setenv(protocol.SWITCH, "post" if last else "")
    with pytest.raises(
        ArgumentError, match=rf"rank {ranks.size - 1}: MPIDL_CENTER='post': expected active_message or rma"
    ):
        protocol.choose(ranks, ranks, never)
    if ranks.size > 1:
        monkeypatch.setenv(protocol.SWITCH, "active_message" if last else "rma")
        with pytest.raises(
            ArgumentError, match=rf"is 'rma' on rank 0 and 'active_message' on rank {ranks.size - 1}: set it"
        ):
            protocol.choose(ranks, ranks, never)


def test_between_nodes_the_slowest_rank_of_a_trial_decides_for_all(far_ranks, monkeypatch):
    ranks, said = far_ranks, []
    if ranks.size == 1:
        pytest.skip("one rank is on one node")
    monkeypatch.setattr(exit_protocol, "say", said.append)
    monkeypatch.setattr(protocol, "_said", set())
    slow = ranks.rank == ranks.size - 1
    times = {"active_message": 0.003 if slow else 0.001, "rma": 0.002}
    assert protocol.choose(ranks, ranks, lambda one, _: times[one]) == "rma"
    times = {"active_message": 0.003, "rma": 0.004 if slow else 0.001}
    assert protocol.choose(ranks, ranks, lambda one, _: times[one]) == "active_message"
    assert (len(said) == 2) == (ranks.rank == 0)
    assert ranks.rank or "took 3.0 ms by active_message, 4.0 ms by rma; MPIDL_CENTER decides otherwise" in said[1]


def test_a_protocol_whose_first_exchange_is_hopeless_is_not_tried_again(ranks, monkeypatch):
    slow, calls = Center.commit_and_pull, []

    def slower(*args, **given):
        calls.append(args)
        time.sleep(0.05 * (ranks.rank == 0))
        return slow(*args, **given)

    monkeypatch.setattr(Center, "commit_and_pull", slower)
    assert servers._trial(ranks, None, "rma", 0.01) > 0
    assert len(calls) == 1  # on every rank
    servers._trial(ranks, None, "rma", 60.0)
    assert len(calls) == 1 + servers._TRIALS


def test_a_center_on_two_nodes_is_tried_chosen_and_exact(far_ranks, monkeypatch):
    """Letters to the other node, and the own node's memory, for shards of several pieces that end anywhere."""
    ranks, count = far_ranks, 4 * PIECE + 1003
    if ranks.size == 1:
        pytest.skip("one rank is on one node")
    monkeypatch.setattr(exit_protocol, "say", lambda _: None)
    chosen = Center(ranks, np.zeros(10), "test")
    assert chosen.protocol in ("active_message", "rma")
    found = ranks.gather_words(np.array([chosen.protocol == "active_message"], np.int64), "test")
    assert len(set(found.ravel())) == 1
    chosen.close()
    server = Center(ranks, np.arange(float(count)), "test", needs=Requirements(sums=True), protocol="active_message")
    out, mine = np.empty(count), np.arange(count) % 7 * (ranks.rank + 1.0)
    for _ in range(5):
        server.commit_and_pull(mine, out)
    server.add_to_sums(mine)
    ranks.barrier("test")
    total = np.arange(count) % 7 * float(sum(range(1, ranks.size + 1)))
    assert server.pull(out) == 5 * ranks.size
    assert np.array_equal(out, np.arange(count) + 5 * total)
    assert np.array_equal(server.sums(), total)
    ranks.barrier("test")
    server.close()


def test_a_saved_center_comes_back_element_by_element(ranks):
    """More runs of elements than are sent one by one: then the whole range is sent."""
    count = 2_000_003
    residual = np.zeros(count)
    residual[::7001] = 1 + np.arange(residual[::7001].size)
    server = Center(ranks, np.ones(count), "test", protocol="active_message")
    if ranks.rank == 0:
        server.restore(17, residual)
    ranks.barrier("test")
    out = np.empty(count)
    assert server.pull(out) == 17
    assert np.array_equal(out, 1 + residual)
    ranks.barrier("test")
    server.close()


@pytest.mark.parametrize("far", [False, True])
def test_long_runs_of_one_shard_come_back_in_their_places(ranks, request, far):
    """Two messages to one rank, each of more pieces than are under way at a time."""
    if far:
        request.getfixturevalue("far_ranks")
    long = (AHEAD + 2) * PIECE
    shard = 2 * long + 79 * 64  # a whole number of cache lines: each rank has one, with a gap in the middle
    residual = 1 + np.arange(float(ranks.size * shard))
    for rank in range(ranks.size):
        residual[rank * shard + long : (rank + 1) * shard - long] = 0
    server = Center(ranks, np.ones(residual.size), "test", protocol="active_message")
    if ranks.rank == 0:
        server.restore(1, residual)
    ranks.barrier("test")
    out = np.empty(residual.size)
    server.pull(out)
    assert np.array_equal(out, 1 + residual)
    ranks.barrier("test")
    server.close()


def test_an_exchange_given_up_half_way_lets_no_other_follow(comm, monkeypatch):
    ranks = comm.topology.duplicate("test of messages given up")
    monkeypatch.setenv(protocol.SWITCH, "active_message")
    server = Center(ranks, np.zeros(10), "test")
    channel = server._messages.ranks.channel
    monkeypatch.setattr(channel, "given_up", "an exchange was given up half-way")
    with pytest.raises(ClosedError, match="the center takes no further calls: an exchange was given up half-way"):
        server.pull(np.empty(10))
    monkeypatch.setattr(channel, "given_up", None)
    server.close()
    ranks.free()


def test_a_helper_that_waits_for_a_dead_rank_s_lock_can_be_ended(ranks, monkeypatch):
    """Every rank writes to itself; of its memory the first block is held by a process that will not come back."""
    monkeypatch.setattr(exit_protocol, "opened", lambda _: None)
    blocks = Plan("a variable", "float64", (8,) * ranks.size, reached=(8,) * ranks.size, alone=True).make(ranks)
    server = MessageServer(ranks, [blocks], "test", lambda: None)
    helper = Progress(ranks, "test", server)
    lock = ctypes.c_uint32.from_address(blocks._center.memory)
    lock.value = 4711
    message = ActiveMessage(
        server.ranks, ranks.rank, np.array([(0, READ, AFTER, 0, 8, 1.0)], HEADER), None, np.empty(8)
    )
    while not server._queues:
        message.advance()
        time.sleep(0.001)
    started = time.monotonic()
    helper.end()
    assert time.monotonic() - started < 5
    assert "an answer (the active messages of test) was given up half-way" in server.ranks.channel.given_up
    assert not server.serve()
    lock.value = 0
    answer = message._under_way[0][0]
    answer.Cancel()
    answer.Wait()
    server._queues.clear()
    server.ranks.channel.given_up = None
    server.close()
    blocks.close()
