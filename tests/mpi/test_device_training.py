"""`mpidl.Synchronous` on a device where strides and buffers matter: channels_last, BatchNorm statistics in `finish()`.

The device is the host's, see tests/cuda_host; torch's work comes in the order of its stream (`Fake.ordered`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_helpers import assert_alike, assert_close

import mpidl

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_host"))
from fake import Fake, fake_device
from host_build import launches

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 4)


@pytest.fixture
def ordered() -> Iterator[Fake]:
    """Every tensor poses as the device's, and torch's work waits for what the stream holds."""
    with fake_device(everything=True) as made, made.ordered():
        yield made


def convolutions() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 3)).double()


def images(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("gradients", "cap"), [("as the parameters", 25), ("contiguous", 1e-5)])
def test_channels_last_gradients(comm, ordered, gradients, cap):
    """Gradients keep their order in memory: that of their parameters, or that of a gradient that was there before."""
    expected = convolutions()
    reference = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    model = convolutions().to(memory_format=torch.channels_last)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mpidl.Synchronous(inner, model, comm=comm, bucket_cap_mb=cap)
    weights = [model[0].weight, model[2].weight]
    if gradients == "contiguous":
        for p in model.parameters():
            p.grad = torch.zeros(p.shape, dtype=p.dtype)
    before = launches()
    for step in range(2):
        optimizer.zero_grad(set_to_none=gradients != "contiguous")
        (model(images(comm.rank, step).contiguous(memory_format=torch.channels_last)) ** 2).mean().backward()
        for weight in weights:
            assert weight.grad.is_contiguous() == (gradients == "contiguous")
            assert weight.grad.is_contiguous(memory_format=torch.channels_last) != (gradients == "contiguous")
        reference.zero_grad()
        (expected(torch.cat([images(rank, step) for rank in range(comm.size)])) ** 2).mean().backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
        optimizer.step()
        reference.step()
    assert launches() > before
    optimizer.finish()
    assert_close(model, expected)
    ordered.everything = False
    assert_alike(comm, model)


def test_the_mean_of_buffers_at_the_end(comm, ordered):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    model.register_buffer("halves", torch.full((5,), float(comm.rank), dtype=torch.bfloat16))
    model.register_buffer("strided", torch.zeros(4, 2).T)
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, buffers="mean")
    model[1].running_mean.fill_(comm.rank)
    model[1].running_var.fill_(2 * comm.rank + 1)
    model[1].num_batches_tracked.fill_(10 + comm.rank)
    model.halves.fill_(comm.rank)
    model.strided.copy_((torch.arange(8.0) * (comm.rank + 1)).reshape(2, 4))
    optimizer.finish()
    ordered.synchronize()
    mean = (comm.size - 1) / 2
    assert model[1].running_mean.tolist() == [mean] * 2
    assert model[1].running_var.tolist() == [2 * mean + 1] * 2
    assert model[1].num_batches_tracked.item() == 10
    assert model.halves.tolist() == [mean] * 5
    assert torch.equal(model.strided, (torch.arange(8.0) * (mean + 1)).reshape(2, 4))
