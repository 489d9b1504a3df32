"""What the tests of the asynchronous family share: models with known gradients, and workers that go in turns."""

from __future__ import annotations

import functools

import numpy as np
import torch

import mpidl

KINDS = {
    kind.__name__: kind
    for kind in (
        *(mpidl.Downpour, mpidl.AGN, mpidl.DynSGD, mpidl.ADAG, mpidl.AEASGD),
        *(mpidl.EAMSGD, mpidl.DCASGD, mpidl.GEM, mpidl.DistBelief),
    )
}
OVERLAPPED = {  # a thread makes the exchange while the worker takes local steps
    f"{kind.__name__} overlapped": functools.partial(kind, overlap=1)
    for kind in (mpidl.Downpour, mpidl.AGN, mpidl.DynSGD, mpidl.DistBelief)
}
ELEMENTS = 1000


class Slope(torch.nn.Module):
    """Its gradient is a known integer vector, whatever its parameters are."""

    def __init__(self, rank, dtype=torch.float64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype))
        self.slope = torch.arange(ELEMENTS, dtype=dtype) * (rank + 1)

    def forward(self):
        return self.weight @ self.slope


class Bowl(torch.nn.Module):
    """f = h/2 |w - target|^2: the gradient is h (w - target)."""

    def __init__(self, start, target=0.0, h=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.as_tensor(start, dtype=torch.float64).clone())
        self.target, self.h = torch.as_tensor(target, dtype=torch.float64), h

    def forward(self):
        return self.h / 2 * ((self.weight - self.target) ** 2).sum()


def sgd(model, lr=0.1, **more):
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def one_step(model, optimizer):
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


def in_turns(comm, model, optimizer, steps):
    """All ranks take `steps` steps each, round by round in the order of their ranks."""
    for _ in range(steps):
        for turn in range(comm.size):
            if turn == comm.rank:
                one_step(model, optimizer)
            comm.barrier()


def center_of(optimizer):
    """The center as it is now, flat."""
    return optimizer.snapshot()[1].copy()


def weight(model):
    return model.weight.detach().numpy().copy()


def everyone(comm, values):
    return np.asarray(comm.allgather(np.ascontiguousarray(values)))
