"""Which algorithm is chosen between nodes: pure arithmetic on a placement and a link."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mpidl.collectives import cost_model
from mpidl.mpi.placement import Link

KIB, MIB = 1 << 10, 1 << 20
GIGABIT, TEN, HUNDRED = (Link(20e-6, 8e-9), Link(20e-6, 0.8e-9), Link(2e-6, 0.08e-9))


def ranks(nodes: list[int], link: Link) -> Any:
    """As many ranks on each node."""
    placed = tuple(node for node, count in enumerate(nodes) for _ in range(count))
    return SimpleNamespace(link=link, size=len(placed), placement=SimpleNamespace(nodes=placed))


@pytest.mark.parametrize("nodes", [[1, 1], [2, 2], [3, 1], [8] * 8])
def test_small_sums_are_left_to_mpi_and_large_ones_go_by_lanes_where_the_link_is_the_bound(nodes: list[int]) -> None:
    for link in (GIGABIT, TEN, cost_model._USUAL):
        assert cost_model.choose(ranks(nodes, link), 4 * KIB) == "mpi"
        assert cost_model.choose(ranks(nodes, link), 16 * MIB) != "mpi"


def test_two_nodes_exchange_directly_and_many_by_halving() -> None:
    for nbytes in (MIB, 64 * MIB):
        assert cost_model.choose(ranks([2, 2], GIGABIT), nbytes) == "direct"
    assert cost_model.choose(ranks([2] * 256, Link(100e-6, 8e-9)), 4 * MIB) == "halving_doubling"
    assert cost_model.choose(ranks([2] * 3, GIGABIT), 64 * MIB) == "direct"  # what is beyond a power of two is dear


def test_halves_of_an_allreduce_go_by_lanes_from_some_size_on() -> None:
    for kind in ("reduce_scatter", "allgather"):
        for nodes in ([1, 1], [2, 2], [8] * 8):
            for link in (GIGABIT, TEN):
                assert cost_model.choose(ranks(nodes, link), 4 * KIB, kind=kind) == "mpi"
                assert cost_model.choose(ranks(nodes, link), 16 * MIB, kind=kind) != "mpi"
                whole = cost_model.estimates(ranks(nodes, link), 64 * MIB)
                half = cost_model.estimates(ranks(nodes, link), 64 * MIB, kind=kind)
                assert half["direct"] == pytest.approx(whole["direct"] / 2, rel=0.01)
    for nodes in ([1, 1], [2, 2], [8] * 8):
        assert cost_model.choose(ranks(nodes, GIGABIT), 4 * KIB, kind="broadcast") == "mpi"
        assert cost_model.choose(ranks(nodes, GIGABIT), 16 * MIB, kind="broadcast") == "direct"
    for kind in ("allgather", "broadcast"):
        assert "halving_doubling" not in cost_model.estimates(ranks([2, 2], TEN), MIB, kind=kind)
    many = ranks([2] * 256, Link(100e-6, 8e-9))
    assert cost_model.choose(many, 4 * MIB, kind="reduce_scatter") == "halving_doubling"


def test_bytes_of_mpi_are_those_that_were_counted() -> None:
    for kind, expected in (("allreduce", 1.0), ("reduce_scatter", 1.0), ("allgather", 0.75), ("broadcast", 1.0)):
        assert cost_model._sent_by_mpi(cost_model.Spread(2, 2, 4), kind) == expected


def test_narrow_data_are_never_left_to_mpi_from_some_size_on() -> None:
    for link in (GIGABIT, TEN, HUNDRED):
        for nodes in ([1, 1], [2, 2], [4] * 16):
            assert cost_model.choose(ranks(nodes, link), 256 * KIB, narrow=True) != "mpi"
            assert cost_model.choose(ranks(nodes, link), KIB, narrow=True) == "mpi"
    wide = cost_model.estimates(ranks([1, 1], GIGABIT), 64 * MIB)
    narrow = cost_model.estimates(ranks([1, 1], GIGABIT), 64 * MIB, narrow=True)
    assert narrow["direct"] < 0.51 * wide["direct"]
    assert narrow["mpi"] == wide["mpi"]


def test_a_link_that_is_known_is_not_measured_again() -> None:
    topology = ranks([1, 1], TEN)
    assert cost_model.link_of(topology) is TEN  # it would need a real topology
