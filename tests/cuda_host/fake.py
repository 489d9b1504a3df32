"""A device "fake:0" for the tests: its memory is the host's and its streams run as late as CUDA's may.

torch cannot be taught a device without a backend in C++, so CPU tensors pose as the device's:

* `Fake.tensor` puts one into memory that only the device may touch: a look at it by anything else is a fault;
* with `everything`, every tensor does. torch computes on them at once, so `Fake.synchronize` stands where on a real
  device the stream would keep the order: between what mpidl has put on it and what torch does next. `Fake.ordered`
  puts it before each thing that torch does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from host_build import Memory, finish, host_cuda, owns, unlocked
from torch.utils._python_dispatch import TorchDispatchMode

from mpidl.arrays import devices, view


class _InOrder(TorchDispatchMode):
    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._fake.synchronize()
        return func(*args, **(kwargs or {}))


class Fake:
    """The device, and how arrays come to lie on it."""

    def __init__(self, *, everything: bool) -> None:
        self.everything = everything
        self.stream = 0
        self.memories: list[Memory] = []

    def where(self, tensor: torch.Tensor) -> str:
        """The device that mpidl is told of."""
        return "fake:0" if self.everything or owns(tensor.data_ptr()) else "cpu"

    def tensor(self, data: torch.Tensor) -> torch.Tensor:
        """A tensor of the device with these values."""
        placed = self.empty(data.shape, data.dtype)
        with unlocked():
            placed.copy_(data)
        return placed

    def empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the device with whatever was there."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.memories.append(Memory(nbytes))
        buffer = (ctypes.c_char * nbytes).from_address(self.memories[-1].address)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values, when all that was put on the stream before has been carried out."""
        assert self.where(tensor) == "fake:0"
        self.synchronize()
        with unlocked():
            return tensor.detach().clone()

    def synchronize(self) -> None:
        """Carries out what is on the stream."""
        finish(self.stream)

    def ordered(self) -> TorchDispatchMode:
        """While entered, torch's work comes after what is on the stream."""
        return _InOrder(self)

    # What torch would do on the device, in the order of its stream.

    def empty_like(self, x: Any, shape: Any = None, dtype: str | None = None) -> Any:
        if not isinstance(x, torch.Tensor) or self.where(x) == "cpu":
            return _ORIGINAL["empty_like"](x, shape, dtype)
        return self.empty(x.shape if shape is None else shape, getattr(torch, dtype) if dtype else x.dtype)

    def contiguous(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or self.where(x) == "cpu" or x.is_contiguous():
            return _ORIGINAL["contiguous"](x)
        return self.tensor(self.read(x))

    def copy_into(self, destination: Any, source: Any) -> None:
        self.synchronize()
        with unlocked():
            _ORIGINAL["copy_into"](destination, source)

    def divide(self, array: view.ArrayView, divisor: int) -> None:
        self.synchronize()
        with unlocked():
            _ORIGINAL["divide"](array, divisor)


_ORIGINAL = {name: getattr(view, name) for name in ("empty_like", "contiguous", "copy_into", "divide")}


@contextmanager
def fake_device(*, everything: bool = False) -> Iterator[Fake]:
    """Registers the device for a while."""
    fake = Fake(everything=everything)
    devices.register("fake", lambda number: devices.Device(host_cuda(), number, lambda _: fake.stream))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "_torch_device", fake.where)
        if not everything:
            for name in _ORIGINAL:
                patch.setattr(view, name, getattr(fake, name))
        yield fake
    fake.synchronize()
    devices.register("fake", None)
