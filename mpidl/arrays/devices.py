"""What the memory of an array's device takes: staging in pinned host memory, in the order of the caller's stream.

How an array on a device comes to the host and back stands here and nowhere else. A `Device` is found by an array's view
and works through the CUDA library; torch and cupy are asked for their current stream only.
Never run on hardware: the tests register a device whose memory is the host's and whose streams run as late as allowed.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpidl.arrays.view import ArrayView
from mpidl.errors import ArgumentError
from mpidl.native import cuda as _cuda

_TABLES = 256  # layouts that a device remembers
_KEPT_NBYTES = 1 << 30  # pinned memory that a device keeps for later


class Event:
    """A point in a stream. `Test` is named as MPI's, so that code that polls a request can poll this."""

    def __init__(self, device: Device, stream: int) -> None:
        self._device = device
        self._handle = device.cuda.make("event_make", device.number)
        weakref.finalize(self, device.cuda.call, "event_free", device.number, self._handle).atexit = False
        device.cuda.call("event_record", device.number, self._handle, stream)

    def Test(self) -> bool:  # noqa: N802
        """Returns whether everything before it has been carried out."""
        return bool(self._device.cuda.make("event_done", self._device.number, self._handle))

    def wait(self) -> None:
        """Returns when everything before it has been carried out."""
        self._device.cuda.call("event_wait", self._device.number, self._handle)

    def hold(self, stream: int) -> None:
        """What is put on `stream` from now on waits for it; the caller does not."""
        self._device.cuda.call("stream_wait", self._device.number, stream, self._handle)


class _Pinned:
    """Pinned memory, given back to its device when the last numpy array on it is gone."""

    def __init__(self, device: Device, nbytes: int) -> None:
        size = 1 << max(12, (nbytes - 1).bit_length())
        self._memory = device.take_pinned(size)
        weakref.finalize(self, device.give_pinned, size, self._memory).atexit = False
        self.__array_interface__ = {
            "data": (self._memory, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


class Memory:
    """Bytes on a device, as long as this object lives."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.address = device.cuda.make("allocate", device.number, max(1, nbytes))
        weakref.finalize(self, device.cuda.call, "free", device.number, self.address).atexit = False


class Late:
    """What a call of a table has written, known once it has been carried out."""

    def __init__(self, table: Table, ticket: int) -> None:
        self._table: Table | None = table
        self._ticket = ticket
        self._result = (0, 0.0, True)

    def result(self) -> tuple[int, float, bool]:
        """Waits; returns elements written, the sum of their squares, whether all are finite."""
        if self._table is not None:
            self._result = self._table.result(self._ticket)
            self._table = None
        return self._result


class Table:
    """A segment table on a device. A result that nobody has read is fetched before its slot is used again."""

    def __init__(self, device: Device, counts: Sequence[int], offsets: Sequence[int]) -> None:
        self.segments = _cuda.Segments(device.cuda, device.number, counts, offsets)
        weakref.finalize(self, self.segments.free).atexit = False
        self._calls: list[weakref.ref[Late]] = []
        self._lock = threading.RLock()

    def gather(self, addresses: Sequence[int], dtypes: tuple[str, str], flat: int, scale: float, stream: int) -> Late:
        """Packs, in stream order, from segments of the first dtype into a flat buffer of the second."""
        return self._call(self.segments.gather, addresses, dtypes, flat, scale, stream)

    def scatter(self, addresses: Sequence[int], dtypes: tuple[str, str], flat: int, scale: float, stream: int) -> Late:
        """Unpacks, in stream order, into segments of the first dtype from a flat buffer of the second."""
        return self._call(self.segments.scatter, addresses, dtypes, flat, scale, stream)

    def result(self, ticket: int) -> tuple[int, float, bool]:
        """Waits for a call, one of the last `_cuda.SLOTS`."""
        with self._lock:
            return self.segments.result(ticket)

    def _call(  # noqa: PLR0917
        self, move: Any, addresses: Sequence[int], dtypes: tuple[str, str], flat: int, scale: float, stream: int
    ) -> Late:
        with self._lock:
            if len(self._calls) == _cuda.SLOTS:
                oldest = self._calls.pop(0)()
                if oldest is not None:
                    oldest.result()
            late = Late(self, move(addresses, dtypes[0], flat, dtypes[1], scale=scale, stream=stream))
            self._calls.append(weakref.ref(late))
        return late


class Device:
    """One device.

    Args:
        cuda: the library that works on it.
        number: its number there.
        current_stream: the stream, as a number, on which a kind of array ("torch", "cupy") works now.
    """

    def __init__(self, cuda: _cuda.Cuda, number: int, current_stream: Callable[[str], int]) -> None:
        self.cuda, self.number, self.current_stream = cuda, number, current_stream
        self._side: int | None = None
        self._tables: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], Table] = OrderedDict()
        self._pool: dict[int, list[int]] = {}
        self._pooled = 0
        self._under_way: list[tuple[Event, Any]] = []

    @property
    def side(self) -> int:
        """A stream of mpidl's own: copies on it run beside what the caller's stream computes."""
        if self._side is None:
            self._side = self.cuda.make("stream_make", self.number)
        return self._side

    def table(self, counts: tuple[int, ...], offsets: tuple[int, ...]) -> Table:
        """Returns the table of a layout, made when it is first asked for."""
        key = (counts, offsets)
        if key not in self._tables:
            self._tables[key] = Table(self, counts, offsets)
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def pinned(self, nbytes: int) -> np.ndarray[Any, Any]:
        """Returns pinned bytes; they are reused once nothing refers to them, so keep what the device still copies."""
        return np.asarray(_Pinned(self, nbytes))

    def copy(self, to: int, from_: int, nbytes: int, stream: int) -> None:
        """Copies in stream order, between any two of device memory and pinned memory."""
        if nbytes:
            self.cuda.call("copy", self.number, to, from_, nbytes, stream)

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Writes zeros in stream order."""
        if nbytes:
            self.cuda.call("clear", self.number, address, nbytes, stream)

    def record(self, stream: int) -> Event:
        """Returns the point that the stream has come to."""
        return Event(self, stream)

    def fetch(self, array: ArrayView) -> tuple[ArrayView, Event]:
        """Starts copying a contiguous array to the host.

        Returns:
            The copy, which holds the data once the event is there.
        """
        stream = self.current_stream(array.kind)
        host = self.like(array, array.shape)
        self.copy(host.address, array.address, array.nbytes, stream)
        return host, self.record(stream)

    def like(self, array: ArrayView, shape: tuple[int, ...]) -> ArrayView:
        """Returns pinned host memory for an array of this dtype, as a view; numpy's bfloat16 lies in uint16."""
        count = int(np.prod(shape, dtype=np.int64))
        memory = self.pinned(count * array.itemsize)
        owner = memory.view("uint16" if array.dtype == "bfloat16" else array.dtype).reshape(shape)
        address = memory.ctypes.data
        return ArrayView(owner, address, count, array.dtype, array.itemsize, shape, True, True, "cpu", "numpy")

    def deliver(self, host: ArrayView, array: ArrayView) -> None:
        """Copies a host array that `like` or `fetch` gave into a contiguous array on the device, in stream order."""
        stream = self.current_stream(array.kind)
        self.copy(array.address, host.address, array.nbytes, stream)
        self.keep(self.record(stream), host)

    def keep(self, event: Event, memory: object) -> None:
        """Keeps `memory` alive until the event is there; the garbage collector does not know of streams."""
        self._under_way = [pair for pair in self._under_way if not pair[0].Test()]
        self._under_way.append((event, memory))

    def take_pinned(self, size: int) -> int:
        """Returns pinned memory of exactly this size, fresh or used before."""
        free = self._pool.get(size)
        if free:
            self._pooled -= size
            return free.pop()
        return self.cuda.make("host_allocate", self.number, size)

    def give_pinned(self, size: int, address: int) -> None:
        """Takes back what `take_pinned` gave."""
        if self._pooled + size > _KEPT_NBYTES:
            self.cuda.call("host_free", self.number, address)
            return
        self._pooled += size
        self._pool.setdefault(size, []).append(address)


def of(array: ArrayView) -> Device:
    """Returns the device on which an array lies, which is not the host; raises as `named` does."""
    return named(array.device)


def named(name: str) -> Device:
    """Returns a device by its kind and number, such as "cuda:0".

    Raises:
        ExtensionError: mpidl was built without CUDA.
        ArgumentError: no such kind of device is known.
    """
    if name not in _devices:
        kind, _, number = name.partition(":")
        if kind not in _makers:
            raise ArgumentError(f"arrays on {name} cannot be used: expected cpu or {', '.join(_makers)}")
        _devices[name] = _makers[kind](int(number or 0))
    return _devices[name]


def register(kind: str, maker: Callable[[int], Device] | None) -> None:
    """Says how devices of a kind are made from their numbers; None forgets the kind and its devices."""
    _makers.pop(kind, None)
    for name in [name for name in _devices if name.partition(":")[0] == kind]:
        del _devices[name]
    if maker is not None:
        _makers[kind] = maker


def _cuda_device(number: int) -> Device:
    def current_stream(kind: str) -> int:
        if kind == "torch":
            return int(sys.modules["torch"].cuda.current_stream(number).cuda_stream)
        return int(sys.modules["cupy"].cuda.get_current_stream(number).ptr)

    return Device(_cuda.library(), number, current_stream)


_devices: dict[str, Device] = {}
_makers: dict[str, Callable[[int], Device]] = {"cuda": _cuda_device}
