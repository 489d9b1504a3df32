"""Which algorithm carries out a collective: shared memory on one node, MPI otherwise.

All ranks choose alike, by what the call's word says (operation, dtype, count) and where the ranks are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpidl import _node, arrays, shared_memory
from mpidl.arrays import ArrayView
from mpidl.collectives.agreement import Call, agree, explain, number
from mpidl.collectives.in_node import Job, Node
from mpidl.collectives.sources import Source
from mpidl.collectives.steps import Driven, Steps
from mpidl.topology import Topology


class Collectives:
    """The collectives of one topology's ranks on flat host memory; making one is a collective.

    Every method is a generator (see `steps`) that first makes sure that all ranks made the same call.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        segment = shared_memory.make_segment(topology) if shared_memory.possible(topology) else None
        self.node: Node | None = None if segment is None else Node(segment)

    def takes(self, dtype: str, op: str) -> bool:
        """Whether reductions of `dtype` need no wider accumulator than the dtype itself."""
        return self.node is not None and _node.reduces(dtype, op)

    def barrier(self, call: Call) -> Steps:
        """The agreement is the barrier: it completes when all ranks have come. Raises this rank's own refusal too."""
        if self.node is None:
            yield from agree(self.topology, call)
            return
        yield from self._done(call, self.node.agree(self._words(call)))
        if call.error is not None:
            raise call.error

    def allreduce(self, call: Call, send: ArrayView, receive: ArrayView, op: str) -> Steps:
        """Reduces `send` into `receive`; they lie apart, or in shared memory only begin at one address."""
        yield from self._reduce("allreduce", call, send, receive, op)

    def reduce(self, call: Call, send: ArrayView, receive: ArrayView | None, op: str, root: int) -> Steps:
        """As `allreduce`, with a result on `root` only; elsewhere `receive` is None."""
        yield from self._reduce("reduce", call, send, receive, op, root=root)

    def reduce_scatter(self, call: Call, send: ArrayView, receive: ArrayView, op: str) -> Steps:
        """Reduces `send`, of size equal blocks, block r of which lands in `receive` on rank r; they lie apart."""
        yield from self._reduce("reduce_scatter", call, send, receive, op)

    def broadcast(self, call: Call, memory: ArrayView, root: int) -> Steps:
        """Copies root's bytes into everybody's `memory`."""
        if self.node is None:
            yield from agree(self.topology, call)
            yield from self.topology.start_broadcast(memory, root) if memory.count else ()
            return
        yield from self._done(call, self.node.broadcast(self._words(call), memory, root))

    def allgather(self, call: Call, send: ArrayView, receive: ArrayView) -> Steps:
        """Collects everybody's `send`, alike in size, in rank order in `receive`."""
        if self.node is None:
            yield from agree(self.topology, call)
            yield from self.topology.start_allgather(send, receive) if send.count else ()
            return
        yield from self._done(call, self.node.allgather(self._words(call), send, receive))

    def alltoall(self, call: Call, send: ArrayView, receive: ArrayView) -> Steps:
        """Sends block r of `send` to rank r and collects the blocks that come back, in rank order."""
        yield from self.barrier(call)
        yield from self.topology.start_alltoall(send, receive) if send.count else ()

    def _reduce(
        self, kind: str, call: Call, send: ArrayView, receive: ArrayView | None, op: str, *, root: int = 0
    ) -> Steps:
        divisor = self.topology.size if op == "mean" else 1
        if self.node is not None and _node.reduces(send.dtype, op):
            options = {"root": root, "divisor": float(divisor)}
            words = self._words(call)
            yield from self._done(call, self.node.reduce_like(kind, words, send, receive, op, **options))
            return
        yield from self.barrier(call)
        if send.count:
            start: Any = getattr(self.topology, f"start_{kind}")
            yield from start(send, receive, op, root) if kind == "reduce" else start(send, receive, op)
            if divisor != 1 and receive is not None:
                values = arrays.as_numpy(receive)
                np.divide(values, divisor, out=values)

    # For the reducer, whose step header has agreed on everything: what begins here is a request, not a generator.

    def start_sum(self, words: tuple[int, int], send: ArrayView, receive: ArrayView, divisor: int) -> Job | Driven:
        """Starts the sum of `send` over all ranks, divided by `divisor`, into `receive`; they lie apart."""
        if self.node is not None:
            return self.node.reduce_like("allreduce", words, send, receive, "sum", divisor=float(divisor))
        return Driven(_sum_by_mpi(self.topology, send, receive, divisor))

    def start_gathered_sum(
        self, words: tuple[int, int], source: Source, receive: ArrayView, divisor: int
    ) -> tuple[Job | Driven, Callable[[], bool]]:
        """As `start_sum`, of what lies scattered over memory, and does not change before it has ended.

        Returns:
            The request; and a function that says, once it has completed, whether all that this rank gave was finite.
        """
        if self.node is not None:
            job = self.node.allreduce_table(words, source, receive, float(divisor))
            return job, lambda: job.finite
        send = arrays.empty_flat(receive.count, receive.dtype)
        finite = source.gather(send)
        return self.start_sum(words, send, receive, divisor), lambda: finite

    def _words(self, call: Call) -> tuple[int, int]:
        return self.topology.channel.sequence, number(call.describe())

    def _done(self, call: Call, job: Job) -> Steps:
        yield job
        if job.differs:
            yield from explain(self.topology, call)


def _sum_by_mpi(topology: Topology, send: ArrayView, receive: ArrayView, divisor: int) -> Steps:
    yield from topology.start_allreduce(send, receive, "sum")
    if divisor != 1:
        values = arrays.as_numpy(receive)
        np.divide(values, divisor, out=values)
