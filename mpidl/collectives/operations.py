"""What a collective call does, from arrays in to arrays out, written as tasks (`collectives.tasks`).

`communicator` drives them, in the same order on all ranks. A call that differs between ranks is refused before any
result is written. How arrays come to where they can be sent and back, whatever their strides, precision and device,
is in `staging`; `dispatch` decides who moves and reduces the bytes.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.arrays.view import ArrayView
from mpidl.collectives import Call, Collectives, Task, describe_reduction
from mpidl.collectives.staging import Target, fetch, widened
from mpidl.errors import ArgumentError, DtypeError, ExtensionError
from mpidl.mpi import datatypes
from mpidl.native import environment


def barrier(ranks: Collectives) -> Task:
    """See `Communicator.barrier`."""
    yield from ranks.barrier()


def allreduce(ranks: Collectives, x: Any, op: str, out: Any) -> Task:
    """See `Communicator.allreduce`."""
    try:
        view = _input(x, op)
        if out is not None:
            _check_out(view, out)
    except (TypeError, ValueError) as error:
        yield from ranks.refuse("allreduce", error)
        raise
    call = yield from ranks.begin(Call("allreduce", describe_reduction(op, view.dtype, view.count), view.device))
    send = yield from _sent(ranks, call, view, op)
    target = Target(x, out, view.shape, call.direct)
    receive = target.memory_for(send, in_place=ranks.takes(send.dtype, op))
    yield from ranks.allreduce(call, send, receive, op)
    return target.finish(receive)


def reduce(ranks: Collectives, x: Any, op: str, root: int, out: Any) -> Task:
    """See `Communicator.reduce`."""
    try:
        view = _input(x, op)
        _check_root(ranks, root)
        if out is not None:
            _check_out(view, out)
    except (TypeError, ValueError) as error:
        yield from ranks.refuse("reduce", error)
        raise
    text = f"{describe_reduction(op, view.dtype, view.count)}, root {root}"
    call = yield from ranks.begin(Call("reduce", text, view.device))
    send = yield from _sent(ranks, call, view, op)
    if ranks.topology.rank != root:
        yield from ranks.reduce(call, send, None, op, root)
        return None
    target = Target(x, out, view.shape, call.direct)
    receive = target.memory_for(send, in_place=ranks.takes(send.dtype, op))
    yield from ranks.reduce(call, send, receive, op, root)
    return target.finish(receive)


def reduce_scatter(ranks: Collectives, x: Any, op: str) -> Task:
    """See `Communicator.reduce_scatter`."""
    try:
        view = _input(x, op)
        shape = _block_shape(ranks, view)
    except (TypeError, ValueError) as error:
        yield from ranks.refuse("reduce_scatter", error)
        raise
    call = yield from ranks.begin(Call("reduce_scatter", describe_reduction(op, view.dtype, view.count), view.device))
    send = yield from _sent(ranks, call, view, op)
    target = Target(x, None, shape, call.direct)
    receive = target.memory_for(send, view.count // ranks.topology.size)
    yield from ranks.reduce_scatter(call, send, receive, op)
    return target.finish(receive)


def broadcast(ranks: Collectives, x: Any, root: int) -> Task:
    """See `Communicator.broadcast`."""
    rank = ranks.topology.rank
    try:
        view = _input(x)
        _check_root(ranks, root)
        if rank != root and not view.writable:
            raise ArgumentError("x is read-only: broadcast writes into it")
    except (TypeError, ValueError) as error:
        yield from ranks.refuse("broadcast", error)
        raise
    call = yield from ranks.begin(Call("broadcast", f"{view.dtype}, count {view.count}, root {root}", view.device))
    if rank == root:
        dense = yield from fetch(view, call.direct)
        yield from ranks.broadcast(call, dense, root)
        return x
    target = Target(x, x, view.shape, call.direct)
    yield from ranks.broadcast(call, target.memory, root)
    return target.finish(target.memory)


def allgather(ranks: Collectives, x: Any) -> Task:
    """See `Communicator.allgather`."""
    try:
        view = _input(x)
    except (TypeError, ValueError) as error:
        yield from ranks.refuse("allgather", error)
        raise
    call = yield from ranks.begin(Call("allgather", f"{view.dtype}, count {view.count}", view.device))
    dense = yield from fetch(view, call.direct)
    target = Target(x, None, (ranks.topology.size, *view.shape), call.direct)
    yield from ranks.allgather(call, dense, target.memory)
    return target.finish(target.memory)


def alltoall(ranks: Collectives, x: Any) -> Task:
    """See `Communicator.alltoall`."""
    try:
        view = _input(x)
        _block_shape(ranks, view)
    except (TypeError, ValueError) as error:
        yield from ranks.refuse("alltoall", error)
        raise
    call = yield from ranks.begin(Call("alltoall", f"{view.dtype}, count {view.count}", view.device))
    dense = yield from fetch(view, call.direct)
    target = Target(x, None, view.shape, call.direct)
    yield from ranks.alltoall(call, dense, target.memory)
    return target.finish(target.memory)


def _input(x: Any, op: str | None = None) -> ArrayView:
    view = arrays.view(x, "x")
    if view.device != "cpu":
        try:
            devices.of(view)
            environment.CUDA_AWARE.read()  # refuses what makes no sense
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


def _sent(ranks: Collectives, call: Call, view: ArrayView, op: str) -> Generator[Any, None, ArrayView]:
    """Returns the array dense, where it can be sent, in a dtype that is reduced as it stands."""
    dense = yield from fetch(view, call.direct)
    return dense if ranks.takes(dense.dtype, op) else widened(dense)
