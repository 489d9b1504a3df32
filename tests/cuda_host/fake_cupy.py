"""A stand-in for cupy, which needs a GPU to be of use: what mpidl asks of its arrays and streams, on the host's CUDA.

The names are cupy's. Memory and streams are those of host_build, so what the host touches itself is a fault, and what
was put on a stream and not waited for is not there yet. The stand-in's own work comes in the order of its stream.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_build import Memory, finish, host_cuda, unlocked

from mpidl.arrays import devices

_stream = 0  # the current one


@contextmanager
def _in_order() -> Iterator[None]:
    finish(_stream)
    with unlocked():
        yield


class Device:
    """Made current by `with`, as cupy's."""

    id = 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class ndarray:  # noqa: N801
    """An array on device 0; `values` is its memory as numpy sees it."""

    def __init__(self, memory: Memory, values: np.ndarray[Any, Any]) -> None:
        self._memory, self._values = memory, values
        self.dtype, self.shape, self.strides = values.dtype, values.shape, values.strides
        self.size, self.itemsize = values.size, values.itemsize
        self.flags = SimpleNamespace(c_contiguous=values.flags.c_contiguous)
        self.data = SimpleNamespace(ptr=values.ctypes.data)
        self.device = Device()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        pointer = {"data": (self.data.ptr, False), "stream": _stream or 1}
        return {**pointer, "shape": self.shape, "strides": self.strides, "typestr": self.dtype.str, "version": 3}

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._memory, self._values[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        with _in_order():
            self._values[key] = value._values if isinstance(value, ndarray) else value

    def __itruediv__(self, divisor: int) -> ndarray:
        with _in_order():
            self._values /= divisor
        return self

    @property
    def T(self) -> ndarray:
        return ndarray(self._memory, self._values.T)

    def copy(self, order: str) -> ndarray:
        assert order == "C"
        made = empty(self.shape, self.dtype)
        made[...] = self
        return made

    def get(self) -> np.ndarray[Any, Any]:
        """The values on the host, in the order of the stream."""
        with _in_order():
            return self._values.copy()


def empty(shape: Any, dtype: Any) -> ndarray:
    whole = np.empty(shape, dtype)
    memory = Memory(whole.nbytes)
    buffer = (ctypes.c_char * max(1, whole.nbytes)).from_address(memory.address)
    return ndarray(memory, np.ndarray(shape, dtype, buffer))


def asarray(values: np.ndarray[Any, Any]) -> ndarray:
    made = empty(values.shape, values.dtype)
    with _in_order():
        made._values[...] = values
    return made


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    """The module `cupy` for a while, with the host's CUDA as mpidl's, on a stream that is not the default one."""
    global _stream
    module = ModuleType("cupy")
    streams = SimpleNamespace(get_current_stream=lambda device_id: SimpleNamespace(ptr=_stream))
    module.__dict__.update(ndarray=ndarray, empty=empty, asarray=asarray, cuda=streams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", module)
        patch.setattr("mpidl.native.cuda.library", host_cuda)
        devices.register("cuda", devices._cuda_device)  # forgets what was found before
        _stream = host_cuda().make("stream_make", 0)
        yield module
        finish(_stream)
        _stream = 0
    devices.register("cuda", devices._cuda_device)
