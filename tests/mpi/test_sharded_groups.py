"""Ranks that are spread unevenly over nodes share weights in groups of one size."""

from __future__ import annotations

import torch
from copies import copied
from sharded_helpers import same
from training_helpers import assert_alike

import mpidl

RANKS = (8,)
SIZES = (6,)
WITH_OTHERS = True
ANY_MPI = True


def train(comm, *, shard):
    torch.manual_seed(1)
    model = torch.nn.Linear(50, 30)
    optimizer = mpidl.Synchronous(torch.optim.Adam(model.parameters()), model, comm=comm, shard=shard)
    for step in range(3):
        optimizer.zero_grad()
        sum((p * (comm.rank - step)).sum() for p in model.parameters()).backward()
        optimizer.step()
    return model, optimizer


def test_nodes_of_four_and_two(comm, monkeypatch):
    expected, plain = train(comm, shard=False)
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 4) as ranks:
        model, optimizer = train(ranks, shard=True)
        assert optimizer._sharded._shards.group_size == 2
        same(model, expected)
        assert_alike(comm, model)
        with mpidl.exclusive(model) as mine, torch.no_grad():
            if mine:
                model.bias.fill_(7)
        assert comm.allreduce(torch.tensor([float(mine)])).item() == 3
        assert (model.bias == 7).all()
        optimizer.finish()
    plain.finish()
