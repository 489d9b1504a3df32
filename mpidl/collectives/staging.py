"""How arrays come to MPI and back: dense, in the dtype in which they are reduced, in memory that MPI may touch.

MPI may touch host memory, and the memory of a device in calls for which `cuda_aware` has decided so ("direct").
Otherwise an array on a device goes through pinned host memory, in the order of its stream. `operations` uses the steps
in this order: `fetch`, `Target`, a collective (`carry_out`), `Target.finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from mpidl.arrays import devices, packing, view
from mpidl.arrays.view import ArrayView
from mpidl.mpi import datatypes


def fetch(array: ArrayView, direct: bool) -> Generator[Any, None, ArrayView]:
    """Returns the array dense and where MPI reads it; yields what must complete first. Copies only what it must."""
    dense = array if array.contiguous else view.view(view.contiguous(array.owner))
    if dense.device == "cpu" or direct:
        return dense
    host, copied = devices.of(dense).fetch(dense)
    yield copied
    return host


def widened(array: ArrayView) -> ArrayView:
    """Returns a dense array in the dtype in which it is reduced, on the same device."""
    wide = datatypes.accumulator(array.dtype)
    return array if wide == array.dtype else _converted(array, _beside(array, array.count, wide))


def carry_out(start: Callable[..., list[Any]], memory: ArrayView, *others: Any) -> Generator[Any, None, None]:
    """Starts an operation on dense memory and yields its requests; does nothing where there is no element.

    MPI touches a device's memory at once, not in the order of a stream. All that the stream holds is waited for first:
    what is sent may still be computed there, and where the result goes may still be read there, by the caller or by
    the tensor that had this memory before the framework's allocator gave it out again.
    """
    on_device = [one for one in (memory, *others) if isinstance(one, ArrayView) and one.device != "cpu"]
    for array in on_device[:1]:  # all are on one device and of one kind
        device = devices.of(array)
        yield device.record(device.current_stream(array.kind))
    if memory.count:
        yield from start(memory, *others)


class Target:
    """Where a call's result ends: `out`, or a new array like x; through memory of its own where MPI cannot write there.

    Args:
        x: what the call was given.
        out: an array for the result, or None.
        shape: of the result.
        direct: whether MPI writes into the memory of devices itself.

    Attributes:
        memory: dense memory in the result's dtype, which MPI may write.
    """

    def __init__(self, x: Any, out: Any, shape: tuple[int, ...], direct: bool) -> None:
        self._out = out
        self._result = view.empty_like(x, shape) if out is None else out
        self._view = view.view(self._result)
        if not self._view.contiguous:
            self._result = view.empty_like(x, shape)
            self._view = view.view(self._result)
        self._staging = None if self._view.device == "cpu" or direct else devices.of(self._view)
        self.memory = self._view if self._staging is None else self._staging.like(self._view, shape)

    def memory_for(self, send: ArrayView, count: int | None = None, *, in_place: bool = False) -> ArrayView:
        """Returns memory of send's dtype that does not overlap `send`; where `in_place`, it may be the same."""
        memory, count = self.memory, send.count if count is None else count
        apart = memory.address + memory.nbytes <= send.address or send.address + send.nbytes <= memory.address
        if memory.dtype == send.dtype and (apart or (in_place and memory.address == send.address)):
            return memory
        return _beside(send, count, send.dtype)

    def finish(self, received: ArrayView) -> Any:
        """Narrows what was received, if it was wider, and copies it out."""
        if received.address != self.memory.address:
            _converted(received, self.memory)
        if self._staging is not None:
            self._staging.deliver(self.memory, self._view)
        view.mark_written(self._view)
        if self._out is not None and self._out is not self._result:
            view.copy_into(self._out, self._result)
            return self._out
        return self._result


def _beside(array: ArrayView, count: int, dtype: str) -> ArrayView:
    """Returns new memory for so many elements on the array's device; on the host numpy's."""
    if array.device == "cpu":
        return view.empty_flat(count, dtype)
    return view.view(view.empty_like(array.owner, (count,), dtype))


def _converted(array: ArrayView, out: ArrayView) -> ArrayView:
    """Copies a dense array into another of the same count and device, there in stream order, and returns that."""
    if array.device != "cpu":
        device = devices.of(array)
        stream = device.current_stream(array.kind)
        if array.dtype == out.dtype:
            device.copy(out.address, array.address, array.nbytes, stream)
        else:
            table = device.table((array.count,), (0,))
            table.gather([array.address], (array.dtype, out.dtype), out.address, 1.0, stream)
    elif array.dtype == out.dtype:  # of any dtype, also those that packing does not know
        view.as_numpy(out)[...] = view.as_numpy(array)
    else:
        packing.Table((array.count,), (0,)).gather([array.address], array.dtype, out.address, out.dtype)
    return out
