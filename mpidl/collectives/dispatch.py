"""Which algorithm carries out a collective: shared memory on one node, lanes or MPI between nodes.

All ranks choose alike, by what the call's word says (operation, dtype, count) and where the ranks are.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives import cost_model
from mpidl.collectives.fast_path import FastPath
from mpidl.collectives.gather_list import GatherList
from mpidl.collectives.lanes import start
from mpidl.collectives.lanes.allgather import Gathering, allgather
from mpidl.collectives.lanes.allreduce import Reduction
from mpidl.collectives.lanes.broadcast import Broadcast, broadcast
from mpidl.collectives.lanes.pipeline import Laned, Lanes, lanes_of_nodes
from mpidl.collectives.lanes.transport import Exchange
from mpidl.collectives.mismatch import Call, agree, explain
from mpidl.collectives.node import Job, Node
from mpidl.collectives.staging import carry_out
from mpidl.collectives.tasks import RunningTask, Task
from mpidl.mpi import cuda_aware, shared_memory
from mpidl.mpi.agreement import number
from mpidl.mpi.topology import Topology
from mpidl.native import environment
from mpidl.native import node as _node

_TAG = 1  # the first of lanes'; 0 is the link's
_WORDS = (0, number("words of agreement"))  # what these say is compared by whoever asks for them


class Collectives:
    """The collectives of one topology's ranks on flat memory; making one is a collective.

    The methods that carry out a call are generators (see `tasks`). A call begins with `begin`; where ranks share memory
    the agreement then travels with the data.

    Args:
        topology: whose ranks.
        directly: whether arrays on a device may be given, for MPI to work on them itself. If some rank asks for that
            (`cuda_aware`), no memory is shared: all ranks must choose alike, wherever their arrays are.
        wire_dtype: in which float32 gradients travel between nodes, where lanes carry them; "" for as they are.
        helper: a thread of this rank moves what happens in shared memory on; ranks may differ in it.

    Attributes:
        node: what carries out calls if all ranks share memory.
        lanes: what carries out large calls if they do so node by node.
        wire_dtype: as given.
        forced: one of `costs.ALGORITHMS` that carries out every call between nodes that it can, alike on all ranks; ""
            for the one that is expected to be fastest.
    """

    def __init__(
        self, topology: Topology, *, directly: bool = False, wire_dtype: str = "", helper: bool = False
    ) -> None:
        self.topology = topology
        self.node: Node | None = None
        self.lanes: Lanes | None = None
        self.quick: FastPath | None = None
        self.forced, self.wire_dtype = "", wire_dtype
        if shared_memory.possible(topology) and shared_memory.all_want_it(
            topology, lambda: environment.SHARED_MEMORY.read() and not (directly and cuda_aware.wished())
        ):
            self._share(helper)
        if len(set(topology.placement.nodes)) > 1:
            cost_model.link_of(topology)  # now, since it is a collective

    def _share(self, helper: bool) -> None:
        topology = self.topology
        segment = shared_memory.make_segment(topology)
        if segment is None:
            return
        node = Node(segment, helper=helper)
        topology.channel.when_given_up = node.give_up
        if len(set(topology.placement.nodes)) == 1:
            self.node = node
            self.quick = None if helper else FastPath(topology, node)
        else:
            # Messages have its tags: a second one needs a topology of its own.
            self.lanes = lanes_of_nodes(topology, node, _TAG)

    def end_helper(self) -> None:
        """Ends the helper, if there is one, when no call is under way."""
        node = self.node if self.lanes is None else self.lanes.node
        if node is not None:
            node.end_helper()

    def takes(self, dtype: str, op: str) -> bool:
        """Whether `dtype` is reduced by `op` as it stands, in place too; otherwise give its accumulator, apart."""
        return self.node is not None and _node.reduces(dtype, op)

    def begin(self, call: Call) -> Generator[Any, None, Call]:
        """Returns the call as the other methods want it: agreed on, if that cannot travel with the data.

        To be the first step of a call: later, other calls may have begun, more of them on some ranks than on others.
        """
        call = replace(call, sequence=self.topology.channel.sequence)
        if self.node is not None:
            return call
        return (yield from agree(self.topology, call))

    def refuse(self, name: str, error: Exception) -> Task:
        """Tells all ranks that this one refuses its arguments; raises `error`."""
        yield from self._agree(Call(name, error=error, sequence=self.topology.channel.sequence))
        raise error

    def barrier(self) -> Task:
        """The agreement is the barrier: it completes when all ranks have come."""
        yield from self._agree((yield from self.begin(Call("barrier"))))

    def allreduce(self, call: Call, send: ArrayView, receive: ArrayView, op: str) -> Task:
        """Reduces `send` into `receive`; they lie apart, or in shared memory only begin at one address."""
        yield from self._reduce("allreduce", call, send, receive, op)

    def reduce(self, call: Call, send: ArrayView, receive: ArrayView | None, op: str, root: int) -> Task:
        """As `allreduce`, with a result on `root` only; elsewhere `receive` is None."""
        yield from self._reduce("reduce", call, send, receive, op, root=root)

    def reduce_scatter(self, call: Call, send: ArrayView, receive: ArrayView, op: str) -> Task:
        """Reduces `send`, of size equal blocks, block r of which lands in `receive` on rank r; they lie apart."""
        yield from self._reduce("reduce_scatter", call, send, receive, op)

    def broadcast(self, call: Call, memory: ArrayView, root: int) -> Task:
        """Copies root's bytes into everybody's `memory`."""
        if self.node is not None:
            yield from self._done(call, self.node.broadcast(self._words(call), memory, root))
        elif self.lanes is not None and self._exchange("broadcast", memory) is not None:
            yield broadcast(self.lanes, Broadcast(self._words(call), memory, root))
        else:
            yield from carry_out(self.topology.start_broadcast, memory, root)

    def allgather(self, call: Call, send: ArrayView, receive: ArrayView) -> Task:
        """Collects everybody's `send`, alike in size, in rank order in `receive`."""
        if self.node is not None:
            yield from self._done(call, self.node.allgather(self._words(call), send, receive))
        elif self.lanes is not None and self._exchange("allgather", receive) is not None:
            yield allgather(self.lanes, Gathering(self._words(call), send, receive))
        else:
            yield from carry_out(self.topology.start_allgather, send, receive)

    def alltoall(self, call: Call, send: ArrayView, receive: ArrayView) -> Task:
        """Sends block r of `send` to rank r and collects the blocks that come back, in rank order."""
        yield from self._agree(call)
        yield from carry_out(self.topology.start_alltoall, send, receive)

    def _reduce(
        self, kind: str, call: Call, send: ArrayView, receive: ArrayView | None, op: str, *, root: int = 0
    ) -> Task:
        divisor = self.topology.size if op == "mean" else 1
        if self.node is not None and _node.reduces(send.dtype, op):
            options = {"root": root, "divisor": float(divisor)}
            words = self._words(call)
            yield from self._done(call, self.node.reduce_like(kind, words, send, receive, op, **options))
            return
        yield from self._agree(call)
        exchange = self._exchange(kind, send, op)
        if exchange is not None and self.lanes is not None and receive is not None:
            what = Reduction(self._words(call), send, receive, op, float(divisor), exchange)
            yield start.start(self.lanes, kind, what)
            return
        rest = (receive, op, root) if kind == "reduce" else (receive, op)
        yield from carry_out(getattr(self.topology, f"start_{kind}"), send, *rest)
        if divisor != 1 and receive is not None:
            view.divide(receive, divisor)

    def _exchange(self, kind: str, memory: ArrayView, op: str = "sum", wire_dtype: str = "") -> Exchange | None:
        """Returns how leaders exchange their slices, or None if MPI is to carry out the call; `memory` is all data."""
        if self.lanes is None or not start.possible(self.topology, kind, memory, op):
            return None
        narrow = bool(wire_dtype) and memory.dtype == "float32"
        chosen = self.forced or cost_model.choose(self.topology, memory.nbytes, kind=kind, narrow=narrow)
        return start.EXCHANGES.get(chosen)

    def _sum_by_lanes(
        self, words: tuple[int, int], send: ArrayView | GatherList, receive: ArrayView, divisor: int
    ) -> Laned | None:
        """Starts a sum by lanes; None if MPI is to carry it out."""
        exchange = self._exchange("allreduce", receive, "sum", self.wire_dtype)
        if exchange is None or self.lanes is None:
            return None
        what = Reduction(words, send, receive, "sum", float(divisor), exchange, self.wire_dtype)
        return start.start(self.lanes, "allreduce", what)

    def _agree(self, call: Call) -> Task:
        """Makes sure that all ranks made this call, unless they know."""
        if self.node is not None:
            yield from self._done(call, self.node.agree(self._words(call)))
        elif not call.agreed:
            yield from agree(self.topology, call)

    def _words(self, call: Call) -> tuple[int, int]:
        return call.sequence, number(call.describe())

    def _done(self, call: Call, job: Job) -> Task:
        yield job
        if job.differs:
            yield from explain(self.topology, call)

    # For the reducer, whose step header has agreed on everything: what begins here is a request, not a generator.

    def start_words_gather(self, send: np.ndarray[Any, Any], receive: np.ndarray[Any, Any]) -> Any:
        """Starts collecting every rank's words, alike in length, on every rank; both arrays must outlive it."""
        if self.node is None:
            return self.topology.start_words_gather(send, receive)
        return self.node.allgather(_WORDS, view.view(send), view.view(receive))

    def start_sum(self, words: tuple[int, int], send: ArrayView, receive: ArrayView, divisor: int) -> Sum:
        """Starts the sum of `send` over all ranks, divided by `divisor`, into `receive`; they lie apart."""
        if self.node is not None:
            return self.node.reduce_like("allreduce", words, send, receive, "sum", divisor=float(divisor))
        started = self._sum_by_lanes(words, send, receive, divisor)
        return _SumByMPI(self.topology, send, receive, divisor) if started is None else started

    def start_gathered_sum(self, words: tuple[int, int], source: GatherList, receive: ArrayView, divisor: int) -> Sum:
        """As `start_sum`, of what lies scattered over memory, and does not change before it has ended."""
        if self.node is not None:
            return self.node.allreduce_table(words, source, receive, float(divisor))
        under_way = self._sum_by_lanes(words, source, receive, divisor)
        if under_way is not None:
            return under_way
        send = view.empty_flat(receive.count, receive.dtype)
        started = time.perf_counter()
        finite = source.gather(send)
        return _SumByMPI(self.topology, send, receive, divisor, finite=finite, packing=time.perf_counter() - started)


class Sum(Protocol):
    """A sum under way, a request."""

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting."""

    def tried(self) -> bool:
        """As `Test`, but may wait for a moment."""

    @property
    def finite(self) -> bool:
        """Whether all that this rank gave is finite, once it has completed; asked only where that was looked at."""

    @property
    def seconds(self) -> tuple[float, float]:
        """What this rank has spent on packing, and on reducing and copying, so far."""


class _SumByMPI(RunningTask):
    """MPI does not say how it spends its time."""

    def __init__(
        self,
        topology: Topology,
        send: ArrayView,
        receive: ArrayView,
        divisor: int,
        *,
        finite: bool = True,
        packing: float = 0.0,
    ) -> None:
        super().__init__(_sum_by_mpi(topology, send, receive, divisor))
        self.finite, self.seconds = finite, (packing, 0.0)


def _sum_by_mpi(topology: Topology, send: ArrayView, receive: ArrayView, divisor: int) -> Task:
    yield from topology.start_allreduce(send, receive, "sum")
    if divisor != 1:
        view.divide(receive, divisor)
