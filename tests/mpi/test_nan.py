"""min and max where some rank holds a NaN: a NaN wins as in numpy, on every rank, whoever carries the call out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from copies import copied
from known import FLOATING

import mpidl
from mpidl.collectives import cost_model

WITH_OTHERS = True
ANY_MPI = True
WAYS = {  # who carries the call out
    "the node": ("MPIDL_SHARED_MEMORY", "1", "direct"),
    "lanes, direct": ("MPIDL_NODE_SIZE", "2", "direct"),
    "lanes, halving": ("MPIDL_NODE_SIZE", "1", "halving_doubling"),
    "MPI": ("MPIDL_SHARED_MEMORY", "0", "mpi"),
    "MPI between nodes": ("MPIDL_NODE_SIZE", "2", "mpi"),
}


@pytest.fixture(params=WAYS)
def ranks(
    world_comm: mpidl.Communicator, request: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[mpidl.Communicator]:
    variable, value, exchange = WAYS[request.param]
    monkeypatch.setattr(cost_model, "choose", lambda *_, **__: exchange)
    with copied(world_comm, monkeypatch, variable, value) as copy:
        yield copy


def values(rank: int, count: int) -> np.ndarray[Any, Any]:
    """Numbers of either sign; each rank has a NaN in a place of its own, of either sign, and infinities stand about."""
    i = np.arange(count)
    found = ((7 * rank + 5 * i) % 23 - 11.0) / 4
    found[i % 9 == 4] = np.inf if rank % 2 else -np.inf
    found[i % 11 == rank] = np.nan
    found[i % 13 == rank] = -np.nan
    return found


def alike(found: Any, expected: Any) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("count", [3, 500, 40_000])
def test_a_nan_wins_on_every_rank(ranks: mpidl.Communicator, count: int) -> None:
    count *= ranks.size
    inputs = np.stack([values(rank, count) for rank in range(ranks.size)])
    block = slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)
    for name in FLOATING:
        dtype = getattr(torch, name)
        x = torch.from_numpy(inputs[ranks.rank]).to(dtype)
        for op in ("min", "max"):
            expected = torch.from_numpy(getattr(np, f"{op}imum").reduce(inputs)).to(dtype)
            results = [ranks.allreduce(x, op), ranks.allreduce(x.clone(), op, out=torch.empty_like(x))]
            assert all(alike(found, expected) for found in results), (name, op)
            assert alike(ranks.reduce_scatter(x, op), expected[block]), (name, op)
            found = ranks.reduce(x, op, root=ranks.size - 1)
            assert ranks.rank != ranks.size - 1 or alike(found, expected), (name, op)
            if name in ("float32", "float64"):  # the way without detours
                out = x.numpy().copy()
                assert alike(torch.from_numpy(ranks.allreduce(out, op, out=out)), expected), (name, op)


def test_zeros_of_either_sign_give_the_same_on_every_rank(ranks: mpidl.Communicator) -> None:
    for zeros in ([0.0, -0.0], [-0.0, 0.0]):
        for name in FLOATING:
            x = torch.tensor([zeros[ranks.rank % 2], -0.0, 0.0], dtype=getattr(torch, name))
            for op in ("min", "max"):
                signs = ranks.allgather(ranks.allreduce(x, op).signbit().to(torch.uint8))
                assert (signs == signs[0]).all() and signs[0, 1] == 1 and signs[0, 2] == 0, (name, op)
