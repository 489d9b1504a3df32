"""What a collective call does, from arrays in to arrays out, written as generators of MPI requests.

Each generator yields the request that must complete before it can go on and returns the call's result; `communicator`
drives them, in the same order on all ranks. The first thing every call does is to agree on what it is (`_agree`): a
call that differs between ranks is refused there, before any data moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl import arrays, datatypes, packing
from mpidl.arrays import ArrayView
from mpidl.errors import ArgumentError, DtypeError, MismatchError
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
    send = _Accumulator(x, view)
    target = _Target(x, out, view.shape)
    receive = target.memory_for(send.view)
    yield from topology.start_allreduce(send.view, receive, op) if view.count else ()
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
    send = _Accumulator(x, view)
    if topology.rank != root:
        yield from topology.start_reduce(send.view, None, op, root) if view.count else ()
        return None
    target = _Target(x, out, view.shape)
    receive = target.memory_for(send.view)
    yield from topology.start_reduce(send.view, receive, op, root) if view.count else ()
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
    send = _Accumulator(x, view)
    target = _Target(x, None, shape)
    receive = target.memory_for(send.view, view.count // topology.size)
    yield from topology.start_reduce_scatter(send.view, receive, op) if view.count else ()
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
    dense = arrays.contiguous(x)
    yield from topology.start_broadcast(arrays.view(dense), root) if view.count else ()
    if topology.rank != root:
        if dense is not x:
            arrays.copy_into(x, dense)
        arrays.mark_written(view)
    return x


def allgather(topology: Topology, x: Any) -> Steps:
    """See `Communicator.allgather`."""
    try:
        view = _input(x)
        call = Call("allgather", f"{view.dtype}, count {view.count}")
    except (TypeError, ValueError) as error:
        view, call = None, Call("allgather", error=error)
    yield from _agree(topology, call)
    assert view is not None
    dense, result = arrays.contiguous(x), arrays.empty_like(x, (topology.size, *view.shape))
    yield from topology.start_allgather(arrays.view(dense), arrays.view(result)) if view.count else ()
    return result


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
    dense, result = arrays.contiguous(x), arrays.empty_like(x)
    yield from topology.start_alltoall(arrays.view(dense), arrays.view(result)) if view.count else ()
    return result


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
        raise DtypeError(f"x is on {view.device}: expected an array in host memory")
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


class _Accumulator:
    """The input in the dtype in which it is reduced, dense; owns what it had to copy."""

    def __init__(self, x: Any, view: ArrayView) -> None:
        wide = datatypes.accumulator(view.dtype)
        if wide != view.dtype:
            owner = np.empty(view.count, wide)
            packing.pack([x], owner)
            view = arrays.view(owner)
        self.view = view if view.contiguous else arrays.view(arrays.contiguous(x))


class _Target:
    """Where a reduction ends: `out`, or a new array like x; through memory of its own where MPI cannot write there."""

    def __init__(self, x: Any, out: Any, shape: tuple[int, ...]) -> None:
        self._out = out
        self._result = arrays.empty_like(x, shape) if out is None else out
        self._view = arrays.view(self._result)
        if not self._view.contiguous:
            self._result = arrays.empty_like(x, shape)
            self._view = arrays.view(self._result)

    def memory_for(self, send: ArrayView, count: int | None = None) -> ArrayView:
        """Returns memory of the accumulator's dtype that does not overlap `send`."""
        result = self._view
        count = send.count if count is None else count
        apart = result.address + result.nbytes <= send.address or send.address + send.nbytes <= result.address
        if result.dtype == send.dtype and apart:
            return result
        return arrays.view(np.empty(count, send.dtype))

    def finish(self, received: ArrayView, divisor: int) -> Any:
        """Divides, where a mean was asked for, in the accumulator; then narrows, then copies out."""
        if divisor != 1:
            values = arrays.as_numpy(received)
            np.divide(values, divisor, out=values)
        if received.dtype != self._view.dtype:
            packing.pack([arrays.as_numpy(received)], self._result.reshape(-1))
        elif received.address != self._view.address:
            arrays.as_numpy(self._view)[...] = arrays.as_numpy(received)
        arrays.mark_written(self._view)
        if self._out is not None and self._out is not self._result:
            arrays.copy_into(self._out, self._result)
            return self._out
        return self._result
