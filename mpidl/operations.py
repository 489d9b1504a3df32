"""What a collective call does, from arrays in to arrays out, written as generators of requests (`collectives.steps`).

`communicator` drives them, in the same order on all ranks. A call works on dense arrays in host memory: what is strided
or on a device is brought there (`_fetch`) and back (`_Target`). A call that differs between ranks is refused before any
result is written. Who moves and reduces the bytes is decided in `collectives`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from mpidl import arrays, datatypes, devices, packing
from mpidl.arrays import ArrayView
from mpidl.collectives import Call, Collectives, Steps
from mpidl.errors import ArgumentError, DtypeError, ExtensionError


def barrier(ranks: Collectives) -> Steps:
    """See `Communicator.barrier`."""
    yield from ranks.barrier(Call("barrier"))


def allreduce(ranks: Collectives, x: Any, op: str, out: Any) -> Steps:
    """See `Communicator.allreduce`."""
    try:
        view = _input(x, op)
        if out is not None:
            _check_out(view, out)
    except (TypeError, ValueError) as error:
        yield from ranks.barrier(Call("allreduce", error=error))
        raise
    send = yield from _sent(ranks, view, op)
    target = _Target(x, out, view.shape)
    receive = target.memory_for(send, in_place=ranks.takes(send.dtype, op))
    call = Call("allreduce", f"op={op!r}, {view.dtype}, count {view.count}")
    yield from ranks.allreduce(call, send, receive, op)
    return target.finish(receive)


def reduce(ranks: Collectives, x: Any, op: str, root: int, out: Any) -> Steps:
    """See `Communicator.reduce`."""
    try:
        view = _input(x, op)
        _check_root(ranks, root)
        if out is not None:
            _check_out(view, out)
    except (TypeError, ValueError) as error:
        yield from ranks.barrier(Call("reduce", error=error))
        raise
    send = yield from _sent(ranks, view, op)
    call = Call("reduce", f"op={op!r}, {view.dtype}, count {view.count}, root {root}")
    if ranks.topology.rank != root:
        yield from ranks.reduce(call, send, None, op, root)
        return None
    target = _Target(x, out, view.shape)
    receive = target.memory_for(send, in_place=ranks.takes(send.dtype, op))
    yield from ranks.reduce(call, send, receive, op, root)
    return target.finish(receive)


def reduce_scatter(ranks: Collectives, x: Any, op: str) -> Steps:
    """See `Communicator.reduce_scatter`."""
    try:
        view = _input(x, op)
        shape = _block_shape(ranks, view)
    except (TypeError, ValueError) as error:
        yield from ranks.barrier(Call("reduce_scatter", error=error))
        raise
    send = yield from _sent(ranks, view, op)
    target = _Target(x, None, shape)
    receive = target.memory_for(send, view.count // ranks.topology.size)
    call = Call("reduce_scatter", f"op={op!r}, {view.dtype}, count {view.count}")
    yield from ranks.reduce_scatter(call, send, receive, op)
    return target.finish(receive)


def broadcast(ranks: Collectives, x: Any, root: int) -> Steps:
    """See `Communicator.broadcast`."""
    rank = ranks.topology.rank
    try:
        view = _input(x)
        _check_root(ranks, root)
        if rank != root and not view.writable:
            raise ArgumentError("x is read-only: broadcast writes into it")
    except (TypeError, ValueError) as error:
        yield from ranks.barrier(Call("broadcast", error=error))
        raise
    call = Call("broadcast", f"{view.dtype}, count {view.count}, root {root}")
    if rank == root:
        dense = yield from _fetch(view)
        yield from ranks.broadcast(call, dense, root)
        return x
    target = _Target(x, x, view.shape)
    yield from ranks.broadcast(call, target.host, root)
    return target.finish(target.host)


def allgather(ranks: Collectives, x: Any) -> Steps:
    """See `Communicator.allgather`."""
    try:
        view = _input(x)
    except (TypeError, ValueError) as error:
        yield from ranks.barrier(Call("allgather", error=error))
        raise
    dense, target = (yield from _fetch(view)), _Target(x, None, (ranks.topology.size, *view.shape))
    yield from ranks.allgather(Call("allgather", f"{view.dtype}, count {view.count}"), dense, target.host)
    return target.finish(target.host)


def alltoall(ranks: Collectives, x: Any) -> Steps:
    """See `Communicator.alltoall`."""
    try:
        view = _input(x)
        _block_shape(ranks, view)
    except (TypeError, ValueError) as error:
        yield from ranks.barrier(Call("alltoall", error=error))
        raise
    dense, target = (yield from _fetch(view)), _Target(x, None, view.shape)
    yield from ranks.alltoall(Call("alltoall", f"{view.dtype}, count {view.count}"), dense, target.host)
    return target.finish(target.host)


def _input(x: Any, op: str | None = None) -> ArrayView:
    view = arrays.view(x, "x")
    if view.device != "cpu":
        try:
            devices.of(view)
        except ExtensionError as error:  # said as what it is for this call, so that the other ranks learn of it
            raise DtypeError(f"x is on {view.device}: {error}") from error
    if op is not None:
        datatypes.check(view.dtype, op)
    return view


def _check_out(x: ArrayView, out: Any) -> None:
    view = arrays.view(out, "out")
    for what, expected, found in (
        ("kind", x.kind, view.kind),
        ("dtype", x.dtype, view.dtype),
        ("shape", x.shape, view.shape),
        ("device", x.device, view.device),
    ):
        if expected != found:
            raise ArgumentError(f"out has {what} {found}; expected {expected}, as x has")
    if not view.writable:
        raise ArgumentError("out is read-only")


def _check_root(ranks: Collectives, root: int) -> None:
    size = ranks.topology.size
    if not isinstance(root, int) or not 0 <= root < size:
        raise ArgumentError(f"root is {root!r}; expected a rank from 0 to {size - 1}")


def _block_shape(ranks: Collectives, view: ArrayView) -> tuple[int, ...]:
    size = ranks.topology.size
    if not view.shape or view.shape[0] % size:
        raise ArgumentError(f"x has shape {view.shape}: its first dimension must be a multiple of the {size} ranks")
    return (view.shape[0] // size, *view.shape[1:])


def _fetch(array: ArrayView) -> Generator[Any, None, ArrayView]:
    """Returns the array dense and in host memory; copies what is not, from a device in the order of its stream."""
    dense = array if array.contiguous else arrays.view(arrays.contiguous(array.owner))
    if dense.device == "cpu":
        return dense
    host, copied = devices.of(dense).fetch(dense)
    yield copied
    return host


def _sent(ranks: Collectives, view: ArrayView, op: str) -> Generator[Any, None, ArrayView]:
    """Returns the array dense, in host memory, in a dtype that is reduced as it stands."""
    dense = yield from _fetch(view)
    return dense if ranks.takes(dense.dtype, op) else _widened(dense)


def _widened(array: ArrayView) -> ArrayView:
    """Returns a dense host array in the dtype in which it is reduced."""
    wide = datatypes.accumulator(array.dtype)
    if wide == array.dtype:
        return array
    return _converted(array, arrays.empty_flat(array.count, wide))


def _converted(array: ArrayView, out: ArrayView) -> ArrayView:
    """Copies a dense host array into another of the same count, and returns that."""
    if array.dtype == out.dtype:  # of any dtype, also those that packing does not know
        arrays.as_numpy(out)[...] = arrays.as_numpy(array)
        return out
    packing.Table((array.count,), (0,)).gather([array.address], array.dtype, out.address, out.dtype)
    return out


class _Target:
    """Where a call's result ends: `out`, or a new array like x; through memory of its own where MPI cannot write there.

    Args:
        x: what the call was given.
        out: an array for the result, or None.
        shape: of the result.

    Attributes:
        host: host memory in the result's dtype, which MPI may write.
    """

    def __init__(self, x: Any, out: Any, shape: tuple[int, ...]) -> None:
        self._out = out
        self._result = arrays.empty_like(x, shape) if out is None else out
        self._view = arrays.view(self._result)
        if not self._view.contiguous:
            self._result = arrays.empty_like(x, shape)
            self._view = arrays.view(self._result)
        self._device = None if self._view.device == "cpu" else devices.of(self._view)
        self.host = self._view if self._device is None else self._device.like(self._view, shape)

    def memory_for(self, send: ArrayView, count: int | None = None, *, in_place: bool = False) -> ArrayView:
        """Returns memory of send's dtype that does not overlap `send`; where `in_place`, it may be the same."""
        host, count = self.host, send.count if count is None else count
        apart = host.address + host.nbytes <= send.address or send.address + send.nbytes <= host.address
        if host.dtype == send.dtype and (apart or (in_place and host.address == send.address)):
            return host
        return arrays.empty_flat(count, send.dtype)

    def finish(self, received: ArrayView) -> Any:
        """Narrows what was received, if it was wider, and copies it out."""
        if received.address != self.host.address:
            _converted(received, self.host)
        if self._device is not None:
            self._device.deliver(self.host, self._view)
        arrays.mark_written(self._view)
        if self._out is not None and self._out is not self._result:
            arrays.copy_into(self._out, self._result)
            return self._out
        return self._result
