"""A model for the sharded step, how it is trained, and what must be equal afterwards."""

from __future__ import annotations

import torch
from training_helpers import FEATURES

import mpidl


class Net(torch.nn.Module):
    """Several groups, a parameter that is used every other step, one that never is, and sizes that no block fits."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(FEATURES, 37, dtype=dtype)
        self.other = torch.nn.Linear(FEATURES, 37, dtype=dtype)
        self.second = torch.nn.Linear(37, 29, dtype=dtype)
        self.last = torch.nn.Linear(29, 1, dtype=dtype)
        self.nobody = torch.nn.Linear(4, 4, dtype=dtype)
        self.frozen = torch.nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    def groups(self):
        late = [*self.last.parameters(), *self.nobody.parameters(), self.frozen]
        early = [p for layer in (self.first, self.other, self.second) for p in layer.parameters()]
        return [{"params": early}, {"params": late, "lr": 0.003}]

    def forward(self, x, other=False):
        hidden = self.other(x) if other else self.first(x)
        return self.last(torch.tanh(self.second(torch.relu(hidden))))


def data(rank, step, dtype):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(5, FEATURES, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(x.sum(1, keepdim=True)).to(dtype)


def train(comm, make, *, shard, steps, dtype=torch.float32, begin=0, model=None, load=None, alternate=True, **options):
    model = model or Net(dtype)
    optimizer = mpidl.Synchronous(make(model.groups()), model, comm=comm, shard=shard, **options)
    if load is not None:
        optimizer.load_state_dict(load)
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        x, y = data(comm.rank, step, dtype)
        uses_other = alternate and (step + comm.rank) % 4 == 1
        loss = ((model(x, uses_other) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
    return model, optimizer


def same(found, expected):
    for (name, p), q in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


def same_state(found, expected):
    assert found["param_groups"] == expected["param_groups"]
    assert list(found["state"]) == sorted(expected["state"])
    for index, entries in expected["state"].items():
        assert set(found["state"][index]) == set(entries)
        for key, value in entries.items():
            ours = found["state"][index][key]
            if isinstance(value, torch.Tensor):
                assert ours.dtype == value.dtype and ours.stride() == value.stride(), (index, key)
                assert torch.equal(ours, value), (index, key)
            else:
                assert ours == value, (index, key)
