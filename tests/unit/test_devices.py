"""pack and unpack on a device, which is the host's: see tests/cuda_host."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mpidl
from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.errors import ArgumentError, DtypeError

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_host"))
from fake import Fake, fake_device
from host_build import allocations, launches


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_device() as made:
        yield made


def test_pack_and_unpack_run_on_the_device_and_do_not_wait_for_it(fake: Fake) -> None:
    tensors = [fake.tensor(torch.arange(n, dtype=torch.float32)) for n in (5, 1000, 3)]
    out = fake.tensor(torch.zeros(1010, dtype=torch.bfloat16))
    before = launches()
    packed = mpidl.pack(tensors, out, scale=2.0)
    assert launches() == before + 1
    assert packed.count == 1008
    back = [fake.tensor(torch.zeros(n)) for n in (5, 1000, 3)]
    mpidl.unpack(out, back, scale=0.5)
    expected = torch.cat([torch.arange(n, dtype=torch.float32) for n in (5, 1000, 3)]).mul(2).bfloat16()
    assert torch.equal(fake.read(out)[:1008], expected)
    assert packed.sum_of_squares == pytest.approx(expected.double().square().sum().item(), rel=1e-12)
    assert packed.finite is True
    assert packed.wait() == (1008, packed.sum_of_squares, True)
    assert torch.equal(torch.cat([fake.read(one) for one in back]), expected.float() * 0.5)


def test_looking_at_the_result_waits(fake: Fake) -> None:
    tensor, out = fake.tensor(torch.tensor([70000.0, 1.0])), fake.tensor(torch.zeros(2, dtype=torch.float16))
    assert mpidl.pack([tensor], out).finite is False
    assert mpidl.pack([tensor], out, scale=0.5).sum_of_squares == 35008.0**2 + 0.25


def test_results_that_are_looked_at_late_are_still_theirs(fake: Fake) -> None:
    tensor, out = fake.tensor(torch.ones(4)), fake.tensor(torch.zeros(4))
    results = [mpidl.pack([tensor], out, scale=float(k)) for k in range(11)]
    assert [result.sum_of_squares for result in reversed(results)] == [4.0 * k * k for k in reversed(range(11))]


def test_the_same_layout_allocates_once(fake: Fake) -> None:
    tensors, out = [fake.tensor(torch.ones(n)) for n in (3, 4)], fake.tensor(torch.zeros(7))
    mpidl.pack(tensors, out)
    before = allocations()
    for _ in range(9):
        mpidl.pack(tensors, out)
        mpidl.unpack(out, tensors)
    assert allocations() == before


def test_strided_tensors_travel_in_logical_order(fake: Fake) -> None:
    whole, out = fake.tensor(torch.arange(12.0).reshape(4, 3)), fake.tensor(torch.zeros(4))
    mpidl.pack([whole[:, 1]], out)
    assert fake.read(out).tolist() == [1, 4, 7, 10]
    mpidl.unpack(out, [whole[:, 2]])
    assert fake.read(whole)[:, 2].tolist() == [1, 4, 7, 10]


def test_what_cannot_be_packed_together_is_refused(fake: Fake) -> None:
    here, there = torch.zeros(4), fake.tensor(torch.zeros(4))
    for call in (lambda: mpidl.pack([here], there), lambda: mpidl.unpack(there, [here])):
        with pytest.raises(ArgumentError, match=r"tensors\[0\] is on cpu, .* on fake:0: pack on one device"):
            call()
    with pytest.raises(ArgumentError, match=r"tensors\[0\] is on fake:0, out on cpu"):
        mpidl.pack([there], here)
    with pytest.raises(ArgumentError, match=r"tensors\[1\] is on cpu, out on fake:0"):
        mpidl.pack([there, here], fake.tensor(torch.zeros(8)))
    with pytest.raises(DtypeError, match="float64 cannot be packed as float32"):
        mpidl.pack([fake.tensor(torch.zeros(4, dtype=torch.float64))], there)
    with pytest.raises(ArgumentError, match="expected cpu or cuda"):
        devices.of(arrays.ArrayView(None, 1, 1, "float32", 4, (1,), True, True, "xpu:0", "torch"))


def test_pinned_memory_is_used_again_once_nothing_refers_to_it(fake: Fake) -> None:
    device = devices.of(arrays.view(fake.tensor(torch.zeros(1))))
    first = device.pinned(5000)
    address = first.ctypes.data
    part = first[100:200].view("float32")
    del first
    gc.collect()
    assert device.pinned(5000).ctypes.data != address
    del part
    gc.collect()
    assert device.pinned(8192).ctypes.data == address


def test_memory_under_way_is_kept(fake: Fake) -> None:
    """`deliver` returns before the copy was carried out, and nobody else holds the host's memory."""
    target = fake.tensor(torch.zeros(1000))
    view = arrays.view(target)
    device = devices.of(view)
    host = device.like(view, view.shape)
    host.owner.fill(3)
    device.deliver(host, view)
    del host
    gc.collect()
    device.like(view, view.shape).owner.fill(9)  # would be the same memory
    assert fake.read(target).eq(3).all()
