"""Which algorithm carries out a collective: shared memory on one node, lanes or MPI between nodes.

All ranks choose alike: by the operation, the dtype and the count, which the ranks agree on, and by the ranks' nodes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np

from mpidl.arrays import view
from mpidl.arrays.view import ArrayView
from mpidl.collectives import cost_model
from mpidl.collectives.fast_path import FastPath
from mpidl.collectives.gather_list import GatherList, packed
from mpidl.collectives.lanes import start
from mpidl.collectives.lanes.allgather import allgather
from mpidl.collectives.lanes.allreduce import allreduce
from mpidl.collectives.lanes.broadcast import broadcast
from mpidl.collectives.lanes.pipeline import LaneCall, Lanes, lanes_of_nodes
from mpidl.collectives.lanes.transport import Exchange
from mpidl.collectives.mismatch import Call, agree, raise_mismatch
from mpidl.collectives.node import Job, Node
from mpidl.collectives.ordered import by_mpi
from mpidl.collectives.staging import carry_out
from mpidl.collectives.tasks import Reduction, RunningReduction, Task
from mpidl.mpi import cuda_aware, shared_memory
from mpidl.mpi.agreement import fingerprint
from mpidl.mpi.topology import Topology
from mpidl.native import environment
from mpidl.native import node as _node

_TAG = 1  # the first of lanes'; 0 is the link's
_WORDS = (0, fingerprint("words of agreement"))  # the caller compares what the ranks said


class Collectives:
    """The collectives of one topology's ranks on flat memory; making one is a collective.

    The methods that carry out a call are generators (see `tasks`). A call begins with `begin`; where ranks share memory
    the agreement then travels with the data.

    Args:
        topology: whose ranks.
        directly: whether arrays on a device may be given, for MPI to work on them itself. If some rank asks for that
            (`cuda_aware`), no memory is shared: all ranks must choose alike, wherever their arrays are.
        wire_dtype: in which float32 gradients travel between nodes, where lanes carry them; "" for as they are.
        progress_thread: whether a thread of this rank moves calls in shared memory on while the rank computes; ranks
            may differ in it.

    Attributes:
        node: what carries out calls if all ranks share memory.
        lanes: what carries out large calls if they do so node by node.
        wire_dtype: as given.
        forced: one of `cost_model.ALGORITHMS` that carries out every call between nodes that it can, alike on all
            ranks; "" for the one that is expected to be fastest.
    """

    def __init__(
        self, topology: Topology, *, directly: bool = False, wire_dtype: str = "", progress_thread: bool = False
    ) -> None:
        self.topology = topology
        self.node: Node | None = None
        self.lanes: Lanes | None = None
        self.fast_path: FastPath | None = None
        self.forced, self.wire_dtype = "", wire_dtype
        if shared_memory.possible(topology) and shared_memory.all_want_it(
            topology, lambda: environment.SHARED_MEMORY.read() and not (directly and cuda_aware.wished())
        ):
            self._share(progress_thread)
        if len(set(topology.placement.nodes)) > 1:
            cost_model.link_of(topology)  # now, since it is a collective

    def _share(self, progress_thread: bool) -> None:
        topology = self.topology
        segment = shared_memory.make_segment(topology)
        if segment is None:
            return
        node = Node(segment, progress_thread=progress_thread)
        topology.channel.when_given_up = node.give_up
        if len(set(topology.placement.nodes)) == 1:
            self.node = node
            self.fast_path = None if progress_thread else FastPath(topology, node)
        else:
            # Lanes send with tags of this topology: a second `Lanes` needs a topology of its own.
            self.lanes = lanes_of_nodes(topology, node, _TAG)

    def end_progress_thread(self) -> None:
        """Ends the progress thread, if there is one, when no call is under way."""
        node = self.node if self.lanes is None else self.lanes.node
        if node is not None:
            node.end_progress_thread()

    def takes(self, dtype: str, op: str) -> bool:
        """Whether `dtype` is reduced by `op` as it stands, in place too; otherwise give its accumulator, apart."""
        return self.node is not None and _node.reduces(dtype, op)

    def begin(self, call: Call) -> Generator[Any, None, Call]:
        """Returns the call as the other methods want it: agreed on, if that cannot travel with the data.

        It must be the first step of a call: later, other calls may have begun, on some ranks more than on others.
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
            yield from self._done(call, self.node.broadcast(self._signature(call), memory, root))
        elif self.lanes is not None and self._exchange("broadcast", memory) is not None:
            yield broadcast(self.lanes, self._signature(call), memory, root)
        else:
            yield from carry_out(self.topology.start_broadcast, memory, root)

    def allgather(self, call: Call, send: ArrayView, receive: ArrayView) -> Task:
        """Collects everybody's `send`, alike in size, in rank order in `receive`."""
        if self.node is not None:
            yield from self._done(call, self.node.allgather(self._signature(call), send, receive))
        elif self.lanes is not None and self._exchange("allgather", receive) is not None:
            yield allgather(self.lanes, self._signature(call), send, receive)
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
            signature = self._signature(call)
            job = self.node.reduce_like(kind, signature, send, receive, op, root=root, divisor=float(divisor))
            yield from self._done(call, job)
            return
        yield from self._agree(call)
        exchange = self._exchange(kind, send, op)
        if exchange is not None and self.lanes is not None and receive is not None:
            options: dict[str, Any] = {"op": op, "divisor": float(divisor), "exchange": exchange}
            yield start.reduce(self.lanes, kind, self._signature(call), send, receive, **options)
            return
        rest = (op, root) if kind == "reduce" else (op,)
        yield from by_mpi(getattr(self.topology, f"start_{kind}"), send, receive, *rest)
        if divisor != 1 and receive is not None:
            view.divide(receive, divisor)

    def _exchange(self, kind: str, memory: ArrayView, op: str = "sum", wire_dtype: str = "") -> Exchange | None:
        """Returns how leaders exchange their slices, or None if MPI is to carry out the call; `memory` is all data."""
        if self.lanes is None or not start.possible(self.topology, kind, memory, op):
            return None
        narrow = bool(wire_dtype) and memory.dtype == "float32"
        chosen = self.forced or cost_model.choose(self.topology, memory.nbytes, kind=kind, narrow=narrow)
        return start.EXCHANGES.get(chosen)

    def _start_lanes_sum(
        self, signature: tuple[int, int], send: ArrayView | GatherList, receive: ArrayView, divisor: int
    ) -> LaneCall | None:
        """Starts a sum by lanes; None if MPI is to carry it out."""
        exchange = self._exchange("allreduce", receive, "sum", self.wire_dtype)
        if exchange is None or self.lanes is None:
            return None
        options: dict[str, Any] = {"op": "sum", "divisor": float(divisor), "exchange": exchange}
        return allreduce(self.lanes, signature, send, receive, wire_dtype=self.wire_dtype, **options)

    def _agree(self, call: Call) -> Task:
        """Makes sure that all ranks made this call, unless the ranks have agreed on it already."""
        if self.node is not None:
            yield from self._done(call, self.node.agree(self._signature(call)))
        elif not call.agreed:
            yield from agree(self.topology, call)

    def _signature(self, call: Call) -> tuple[int, int]:
        return call.sequence, fingerprint(call.describe())

    def _done(self, call: Call, job: Job) -> Task:
        yield job
        if job.differs:
            yield from raise_mismatch(self.topology, call)

    # For the reducer, whose step header has agreed on everything: these return requests, not tasks.

    def start_words_gather(self, send: np.ndarray[Any, Any], receive: np.ndarray[Any, Any]) -> Any:
        """Starts collecting every rank's signature, alike in length, on every rank; both arrays must outlive it."""
        if self.node is None:
            return self.topology.start_words_gather(send, receive)
        return self.node.allgather(_WORDS, view.view(send), view.view(receive))

    def start_sum(self, signature: tuple[int, int], send: ArrayView, receive: ArrayView, divisor: int) -> Reduction:
        """Starts the sum of `send` over all ranks, divided by `divisor`, into `receive`; they lie apart."""
        if self.node is not None:
            return self.node.reduce_like("allreduce", signature, send, receive, "sum", divisor=float(divisor))
        started = self._start_lanes_sum(signature, send, receive, divisor)
        return started or RunningReduction(_sum_by_mpi(self.topology, send, receive, divisor))

    def start_gathered_sum(
        self, signature: tuple[int, int], gather_list: GatherList, receive: ArrayView, divisor: int
    ) -> Reduction:
        """As `start_sum`, of what lies scattered over memory, and does not change before the sum has ended."""
        if self.node is not None:
            return self.node.allreduce_list(signature, gather_list, receive, float(divisor))
        started = self._start_lanes_sum(signature, gather_list, receive, divisor)
        if started is not None:
            return started
        send = view.empty_flat(receive.count, receive.dtype)
        alone = packed(gather_list, send)
        task = _sum_by_mpi(self.topology, send, receive, divisor)
        return RunningReduction(task, finite=alone.finite, packing=alone.seconds[0])


def _sum_by_mpi(topology: Topology, send: ArrayView, receive: ArrayView, divisor: int) -> Task:
    yield from topology.start_allreduce(send, receive, "sum")
    if divisor != 1:
        view.divide(receive, divisor)
