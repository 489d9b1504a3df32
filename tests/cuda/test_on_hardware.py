"""What only a real device can show; skipped, and counted, where there is none. None of this has ever run on hardware.

Communicator and Synchronous on hardware: the end of tests/mpi/test_devices.py.
"""

from __future__ import annotations

import time

import pytest
import torch
from packing_reference import reference_pack

import mpidl
from mpidl.arrays import devices, view
from mpidl.native.cuda import Cuda

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device: nothing here has ever run on hardware", allow_module_level=True)

SIZES = (0, 1, 3, 17, 1000, 4099, 1_000_003)
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.int64, torch.int64),
    (torch.int8, torch.int8),
    *[(torch.float32, half) for half in (torch.float16, torch.bfloat16)],
    *[(half, torch.float32) for half in (torch.float16, torch.bfloat16)],
]


def tensors_of(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(size, generator=generator) * 40).to(dtype).cuda() for size in SIZES]


def test_the_library_was_built() -> None:
    assert isinstance(devices.of(view.view(torch.zeros(1, device="cuda"))).cuda, Cuda)


@pytest.mark.parametrize(("source", "flat"), PAIRS)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_pack_and_unpack_agree_with_the_reference(source: torch.dtype, flat: torch.dtype, shift: int) -> None:
    tensors = tensors_of(source)
    total = sum(SIZES)
    out = torch.zeros(total + shift, dtype=flat, device="cuda")[shift:]
    scale = 1.0 if not source.is_floating_point else 0.37
    packed = mpidl.pack(tensors, out, scale=scale)
    expected = torch.zeros(total, dtype=flat)
    wanted = reference_pack([one.cpu() for one in tensors], expected, scale=scale)
    assert torch.equal(out.cpu(), expected)
    assert (packed.count, packed.finite) == (wanted.count, wanted.finite)
    assert packed.sum_of_squares == pytest.approx(wanted.sum_of_squares, rel=1e-12)
    back = [torch.zeros_like(one) for one in tensors]
    mpidl.unpack(out, back)
    assert torch.equal(torch.cat(back).cpu(), expected.to(source))


def test_the_same_call_gives_the_same_bits() -> None:
    tensors, out = tensors_of(torch.float32), torch.zeros(sum(SIZES), device="cuda")
    assert len({mpidl.pack(tensors, out, scale=0.1).sum_of_squares for _ in range(20)}) == 1


def test_packing_follows_the_current_stream_and_returns_at_once() -> None:
    x, out = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    mpidl.pack([x], out)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # about a second
        x.fill_(3)
        started = time.perf_counter()
        packed = mpidl.pack([x], out)
        returned = time.perf_counter() - started
        assert not stream.query()
    assert packed.sum_of_squares == 9.0 * (1 << 20)
    assert returned < 0.5
    assert bool(out.eq(3).all())


def test_staging_goes_to_the_host_and_back_in_stream_order() -> None:
    x, y = torch.arange(1000.0, device="cuda"), torch.zeros(1000, device="cuda")
    device = devices.of(view.view(x))
    x.add_(1)
    host, copied = device.fetch(view.view(x))
    copied.wait()
    assert host.owner.tolist() == list(range(1, 1001))
    device.deliver(host, view.view(y))
    assert torch.equal(x, y)


def test_the_current_device_stays_what_it_was() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    x, out = torch.ones(10, device="cuda:1"), torch.zeros(10, device="cuda:1")
    with torch.cuda.device(0):
        assert mpidl.pack([x], out).sum_of_squares == 10.0
        assert torch.cuda.current_device() == 0


def test_cupy_arrays_are_packed() -> None:
    cupy = pytest.importorskip("cupy")
    x, out = cupy.arange(1000, dtype="float32"), cupy.zeros(1000, dtype="float16")
    assert mpidl.pack([x], out).count == 1000
    assert bool((out == cupy.arange(1000).astype("float16")).all())
