"""What a collective call does, from arrays in to arrays out, written as generators of MPI requests.

Each generator yields the request that must complete before it can go on and returns the call's result; `communicator`
drives them, in the same order on all ranks. The first thing every call does is to agree on what it is (`_agree`): a
call that differs between ranks is refused there, before any data moves. How arrays come to MPI and back, whatever their
strides, precision and device, stands in `transfer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl import arrays, cuda_aware, datatypes, devices
from mpidl.arrays import ArrayView
from mpidl.errors import ArgumentError, DtypeError, ExtensionError, MismatchError
from mpidl.topology import Topology
from mpidl.transfer import Target, carry_out, fetch, widened

Steps = Generator[Any, None, Any]
_DESCRIPTION = 480  # bytes of a call's description that travel when ranks disagree


@dataclass(frozen=True)
class Call:
    """What this rank called, or why it refuses its own arguments."""

    name: str
    arguments: str = ""
    error: Exception | None = None
    device: str = "cpu"  # of this rank's array; may differ between ranks

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
        call = Call("allreduce", f"op={op!r}, {view.dtype}, count {view.count}", device=view.device)
    except (TypeError, ValueError) as error:
        view, call = None, Call("allreduce", error=error)
    direct = yield from _agree(topology, call)
    assert view is not None
    send = widened((yield from fetch(view, direct)))
    target = Target(x, out, view.shape, direct)
    receive = target.memory_for(send)
    yield from carry_out(topology.start_allreduce, send, receive, op)
    return target.finish(receive, topology.size if op == "mean" else 1)


def reduce(topology: Topology, x: Any, op: str, root: int, out: Any) -> Steps:
    """See `Communicator.reduce`."""
    try:
        view = _input(x, op)
        _check_root(topology, root)
        if out is not None:
            _check_out(view, out)
        call = Call("reduce", f"op={op!r}, {view.dtype}, count {view.count}, root {root}", device=view.device)
    except (TypeError, ValueError) as error:
        view, call = None, Call("reduce", error=error)
    direct = yield from _agree(topology, call)
    assert view is not None
    send = widened((yield from fetch(view, direct)))
    if topology.rank != root:
        yield from carry_out(topology.start_reduce, send, None, op, root)
        return None
    target = Target(x, out, view.shape, direct)
    receive = target.memory_for(send)
    yield from carry_out(topology.start_reduce, send, receive, op, root)
    return target.finish(receive, topology.size if op == "mean" else 1)


def reduce_scatter(topology: Topology, x: Any, op: str) -> Steps:
    """See `Communicator.reduce_scatter`."""
    try:
        view = _input(x, op)
        shape = _block_shape(topology, view)
        call = Call("reduce_scatter", f"op={op!r}, {view.dtype}, count {view.count}", device=view.device)
    except (TypeError, ValueError) as error:
        view, call = None, Call("reduce_scatter", error=error)
    direct = yield from _agree(topology, call)
    assert view is not None
    send = widened((yield from fetch(view, direct)))
    target = Target(x, None, shape, direct)
    receive = target.memory_for(send, view.count // topology.size)
    yield from carry_out(topology.start_reduce_scatter, send, receive, op)
    return target.finish(receive, topology.size if op == "mean" else 1)


def broadcast(topology: Topology, x: Any, root: int) -> Steps:
    """See `Communicator.broadcast`."""
    try:
        view = _input(x)
        _check_root(topology, root)
        if topology.rank != root and not view.writable:
            raise ArgumentError("x is read-only: broadcast writes into it")
        call = Call("broadcast", f"{view.dtype}, count {view.count}, root {root}", device=view.device)
    except (TypeError, ValueError) as error:
        view, call = None, Call("broadcast", error=error)
    direct = yield from _agree(topology, call)
    assert view is not None
    if topology.rank == root:
        dense = yield from fetch(view, direct)
        yield from carry_out(topology.start_broadcast, dense, root)
        return x
    target = Target(x, x, view.shape, direct)
    yield from carry_out(topology.start_broadcast, target.memory, root)
    return target.finish(target.memory, 1)


def allgather(topology: Topology, x: Any) -> Steps:
    """See `Communicator.allgather`."""
    try:
        view = _input(x)
        call = Call("allgather", f"{view.dtype}, count {view.count}", device=view.device)
    except (TypeError, ValueError) as error:
        view, call = None, Call("allgather", error=error)
    direct = yield from _agree(topology, call)
    assert view is not None
    dense, target = (yield from fetch(view, direct)), Target(x, None, (topology.size, *view.shape), direct)
    yield from carry_out(topology.start_allgather, dense, target.memory)
    return target.finish(target.memory, 1)


def alltoall(topology: Topology, x: Any) -> Steps:
    """See `Communicator.alltoall`."""
    try:
        view = _input(x)
        _block_shape(topology, view)
        call = Call("alltoall", f"{view.dtype}, count {view.count}", device=view.device)
    except (TypeError, ValueError) as error:
        view, call = None, Call("alltoall", error=error)
    direct = yield from _agree(topology, call)
    assert view is not None
    dense, target = (yield from fetch(view, direct)), Target(x, None, view.shape, direct)
    yield from carry_out(topology.start_alltoall, dense, target.memory)
    return target.finish(target.memory, 1)


def disagreement(descriptions: Iterable[str]) -> str:
    """Returns "ranks 0, 2: this; rank 1: that" for the descriptions of ranks 0, 1, 2, ..."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(descriptions):
        by_text.setdefault(text, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items()
    )


def _agree(topology: Topology, call: Call) -> Generator[Any, None, bool]:
    """Every rank learns whether all made this call; the smallest and the largest word travel as one minimum.

    So does that some rank, given an array on a device, wants to know whether MPI works on it itself: then all decide.

    Returns:
        Whether MPI works on this rank's array where it lies, although that is on a device.
    """
    text = call.describe()
    word = np.array([topology.channel.sequence, number(text)], np.int64)
    wish = cuda_aware.undecided(topology, call.device)
    mine, least = np.array([*word, *-word, -wish], np.int64), np.empty(5, np.int64)
    yield topology.start_words_minimum(mine, least)
    if (least[:2] != -least[2:4]).any():
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
    if least[4]:
        yield from cuda_aware.decide(topology, call.device)
    return cuda_aware.direct(topology, call.device)


def _input(x: Any, op: str | None = None) -> ArrayView:
    view = arrays.view(x, "x")
    if view.device != "cpu":
        try:
            devices.of(view)
            cuda_aware.setting()  # refuses what makes no sense
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
