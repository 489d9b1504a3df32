"""`mpidl.Synchronous(shard=True)` takes the step of the unsharded optimiser, bit for bit where additions are in one
order."""

from __future__ import annotations

import copy

import pytest
import torch
from training_helpers import FEATURES, assert_alike, loss_of

import mpidl

WITH_OTHERS = True

OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.1, **o),
    "momentum": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "nesterov": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, amsgrad=True, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1, **o),
    "adadelta": lambda p, **o: torch.optim.Adadelta(p, **o),
    "adamax": lambda p, **o: torch.optim.Adamax(p, **o),
    "nadam": lambda p, **o: torch.optim.NAdam(p, **o),
    "radam": lambda p, **o: torch.optim.RAdam(p, **o),
    "asgd": lambda p, **o: torch.optim.ASGD(p, t0=3, **o),
    "rprop": lambda p, **o: torch.optim.Rprop(p, **o),
}
FUSED = ("sgd", "momentum", "nesterov", "adam", "adamw", "adagrad")


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


def train(comm, make, *, shard, steps, dtype=torch.float32, begin=0, model=None, load=None, **options):
    model = model or Net(dtype)
    optimizer = mpidl.Synchronous(make(model.groups()), model, comm=comm, shard=shard, **options)
    if load is not None:
        optimizer.load_state_dict(load)
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        x, y = data(comm.rank, step, dtype)
        uses_other = (step + comm.rank) % 4 == 1
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_are_bit_for_bit_the_unsharded_ones(comm, name):
    dtype = torch.float64 if name in ("momentum", "adamw") else torch.float32
    expected, plain = train(comm, OPTIMIZERS[name], shard=False, steps=50, dtype=dtype)
    model, optimizer = train(comm, OPTIMIZERS[name], shard=True, steps=50, dtype=dtype)
    same(model, expected)
    assert_alike(comm, model)
    same_state(optimizer.full_state_dict(), plain.state_dict())
    plain.finish()
    optimizer.finish()
    same(model, expected)
