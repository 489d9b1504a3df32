"""What a collective call does, from arrays in to arrays out, written as generators of MPI requests.

Each generator yields the request that must complete before it can go on and returns the call's result; `communicator`
drives them, in the same order on all ranks. The first thing every call does is to agree on what it is (`_agree`): a
call that differs between ranks is refused there, before any data moves. MPI works on dense arrays in host memory: what
is strided, of half precision or on a device is brought there (`_fetch`) and back (`_Target`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl import arrays, datatypes, devices, packing
from mpidl.arrays import ArrayView
from mpidl.errors import ArgumentError, DtypeError, ExtensionError, MismatchError
from mpidl.topology import Topology

Steps = Generator[Any, None, Any]
_DESCRIPTION = 480  # bytes of a call's description that travel when ranks disagree


@dataclass(frozen=True)
class Call:
    """What this rank called, or why it refuses its own arguments."""

    name: str
    arguments: str = ""
    error: Exception | None = None

    def describe(self) -> str:
        if self.error is not None:
            return f"{self.name} refused its arguments: {type(self.error).__name__}: {self.error}"
        return f"{self.name}({self.arguments})"


def number(text: str) -> int:
    """Returns a 62-bit number that differs when the text differs; alike on every rank, run and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def barrier(topology: Topology) -> Steps:
    """The agreement is the barrier: it completes when all ranks have come."""
    yield from _agree(topology, Call("barrier"))


def allreduce(topology: Topology, x: Any, op: str, out: Any) -> Steps:
    """See `Communicator.allreduce`."""
    try:
        view = _input(x, op)
        if out is not None:
            _check_out(view, out)
        call = Call("allreduce", f"op={op!r}, {view.dtype}, count {view.count}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("allreduce", error=error)
    yield from _agree(topology, call)
    assert view is not None
    send = _widened((yield from _fetch(view)))
    target = _Target(x, out, view.shape)
    receive = target.memory_for(send)
    yield from topology.start_allreduce(send, receive, op) if view.count else ()
    return target.finish(receive, topology.size if op == "mean" else 1)


def reduce(topology: Topology, x: Any, op: str, root: int, out: Any) -> Steps:
    """See `Communicator.reduce`."""
    try:
        view = _input(x, op)
        _check_root(topology, root)
        if out is not None:
            _check_out(view, out)
        call = Call("reduce", f"op={op!r}, {view.dtype}, count {view.count}, root {root}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("reduce", error=error)
    yield from _agree(topology, call)
    assert view is not None
    send = _widened((yield from _fetch(view)))
    if topology.rank != root:
        yield from topology.start_reduce(send, None, op, root) if view.count else ()
        return None
    target = _Target(x, out, view.shape)
    receive = target.memory_for(send)
    yield from topology.start_reduce(send, receive, op, root) if view.count else ()
    return target.finish(receive, topology.size if op == "mean" else 1)


def reduce_scatter(topology: Topology, x: Any, op: str) -> Steps:
    """See `Communicator.reduce_scatter`."""
    try:
        view = _input(x, op)
        shape = _block_shape(topology, view)
        call = Call("reduce_scatter", f"op={op!r}, {view.dtype}, count {view.count}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("reduce_scatter", error=error)
    yield from _agree(topology, call)
    assert view is not None
    send = _widened((yield from _fetch(view)))
    target = _Target(x, None, shape)
    receive = target.memory_for(send, view.count // topology.size)
    yield from topology.start_reduce_scatter(send, receive, op) if view.count else ()
    return target.finish(receive, topology.size if op == "mean" else 1)


def broadcast(topology: Topology, x: Any, root: int) -> Steps:
    """See `Communicator.broadcast`."""
    try:
        view = _input(x)
        _check_root(topology, root)
        if topology.rank != root and not view.writable:
            raise ArgumentError("x is read-only: broadcast writes into it")
        call = Call("broadcast", f"{view.dtype}, count {view.count}, root {root}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("broadcast", error=error)
    yield from _agree(topology, call)
    assert view is not None
    if topology.rank == root:
        dense = yield from _fetch(view)
        yield from topology.start_broadcast(dense, root) if view.count else ()
        return x
    target = _Target(x, x, view.shape)
    yield from topology.start_broadcast(target.host, root) if view.count else ()
    return target.finish(target.host, 1)


def allgather(topology: Topology, x: Any) -> Steps:
    """See `Communicator.allgather`."""
    try:
        view = _input(x)
        call = Call("allgather", f"{view.dtype}, count {view.count}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("allgather", error=error)
    yield from _agree(topology, call)
    assert view is not None
    dense, target = (yield from _fetch(view)), _Target(x, None, (topology.size, *view.shape))
    yield from topology.start_allgather(dense, target.host) if view.count else ()
    return target.finish(target.host, 1)


def alltoall(topology: Topology, x: Any) -> Steps:
    """See `Communicator.alltoall`."""
    try:
        view = _input(x)
        _block_shape(topology, view)
        call = Call("alltoall", f"{view.dtype}, count {view.count}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("alltoall", error=error)
    yield from _agree(topology, call)
    assert view is not None
    dense, target = (yield from _fetch(view)), _Target(x, None, view.shape)
    yield from topology.start_alltoall(dense, target.host) if view.count else ()
    return target.finish(target.host, 1)


def disagreement(descriptions: Iterable[str]) -> str:
    """Returns "ranks 0, 2: this; rank 1: that" for the descriptions of ranks 0, 1, 2, ..."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(descriptions):
        by_text.setdefault(text, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items()
    )


def _agree(topology: Topology, call: Call) -> Steps:
    """Every rank learns whether all made this call; the smallest and the largest word travel as one minimum."""
    text = call.describe()
    word = np.array([topology.channel.sequence, number(text)], np.int64)
    mine, least = np.concatenate([word, -word]), np.empty(4, np.int64)
    yield topology.start_words_minimum(mine, least)
    if (least[:2] != -least[2:]).any():
        sent = np.zeros(_DESCRIPTION, np.uint8)
        raw = text.encode()[:_DESCRIPTION]
        sent[: len(raw)] = np.frombuffer(raw, np.uint8)
        everyone = np.empty((topology.size, _DESCRIPTION), np.uint8)
        yield topology.start_words_gather(sent, everyone)
        if call.error is not None:
            raise call.error
        texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone]
        raise MismatchError(
            f"call {topology.channel.sequence} on {topology.name} differs between ranks: {disagreement(texts)}"
        )
    if call.error is not None:
        raise call.error


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


def _check_root(topology: Topology, root: int) -> None:
    if not isinstance(root, int) or not 0 <= root < topology.size:
        raise ArgumentError(f"root is {root!r}; expected a rank from 0 to {topology.size - 1}")


def _block_shape(topology: Topology, view: ArrayView) -> tuple[int, ...]:
    if not view.shape or view.shape[0] % topology.size:
        raise ArgumentError(
            f"x has shape {view.shape}: its first dimension must be a multiple of the {topology.size} ranks"
        )
    return (view.shape[0] // topology.size, *view.shape[1:])


def _fetch(array: ArrayView) -> Generator[Any, None, ArrayView]:
    """Returns the array dense and in host memory; copies what is not, from a device in the order of its stream."""
    dense = array if array.contiguous else arrays.view(arrays.contiguous(array.owner))
    if dense.device == "cpu":
        return dense
    host, copied = devices.of(dense).fetch(dense)
    yield copied
    return host


def _widened(array: ArrayView) -> ArrayView:
    """Returns a dense host array in the dtype in which it is reduced."""
    wide = datatypes.accumulator(array.dtype)
    if wide == array.dtype:
        return array
    return _converted(array, arrays.view(np.empty(array.count, wide)))


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

    def memory_for(self, send: ArrayView, count: int | None = None) -> ArrayView:
        """Returns memory of the accumulator's dtype that does not overlap `send`."""
        host, count = self.host, send.count if count is None else count
        apart = host.address + host.nbytes <= send.address or send.address + send.nbytes <= host.address
        if host.dtype == send.dtype and apart:
            return host
        return arrays.view(np.empty(count, send.dtype))

    def finish(self, received: ArrayView, divisor: int) -> Any:
        """Divides, where a mean was asked for, in the accumulator; then narrows, then copies out."""
        if divisor != 1:
            values = arrays.as_numpy(received)
            np.divide(values, divisor, out=values)
        if received.address != self.host.address:
            _converted(received, self.host)
        if self._device is not None:
            self._device.deliver(self.host, self._view)
        arrays.mark_written(self._view)
        if self._out is not None and self._out is not self._result:
            arrays.copy_into(self._out, self._result)
            return self._out
        return self._result
