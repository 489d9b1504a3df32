"""Collectives of ranks on one node, in memory that they share: slice by slice; csrc/node/schedule.c carries them out.

This file keeps the calls in their order, one under way at a time; `dispatch` decides which calls come here.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from typing import Any, NamedTuple

from mpidl.arrays.view import ArrayView
from mpidl.collectives.gather_list import GatherList
from mpidl.mpi.shared_memory import Segment
from mpidl.native import node as _node

_PATIENCE = 2_000_000  # nanoseconds in which no signal is looked after


class Part(NamedTuple):
    """A part of flat data, cut in blocks for the first ranks until there are no elements left; all in elements."""

    start: int
    count: int  # type: ignore[assignment]  # the field is wanted more than tuple's method
    block: int


class Job:
    """One call; a request, and the owner of the memory that it works on."""

    __slots__ = ("_kept", "_node", "differs", "done", "struct")

    def __init__(self, node: Node, struct: Any, kept: Any) -> None:
        self._node, self.struct, self._kept = node, struct, kept
        self.done = self.differs = False

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        """Moves on without waiting."""
        return self.done or self._node.move(self, 0)

    def tried(self) -> bool:
        """Moves on, and waits for a moment if a peer is late."""
        return self.done or self._node.move(self, _PATIENCE)

    @property
    def finite(self) -> bool:
        """Whether all that was read by a gather list is finite, once the job is done."""
        return bool(self.struct.finite)

    @property
    def seconds(self) -> tuple[float, float]:
        """Time that this rank has spent on packing, and on reducing and copying results, so far."""
        return self.struct.packing * 1e-9, self.struct.reducing * 1e-9

    def end(self, *, differs: bool) -> None:
        self.done, self.differs, self._kept = True, differs, None


class Node:
    """The calls of one segment, in the order in which they were started.

    Args:
        segment: alike on all ranks.
        progress_thread: whether a thread moves calls on while this rank computes; ranks may differ in it.
    """

    def __init__(self, segment: Segment, *, progress_thread: bool = False) -> None:
        self._segment = segment
        self.end = segment.end
        self._queue: deque[Job] = deque()
        self._thread = _node.start_progress_thread(self.end) if progress_thread else None
        if self._thread is not None:  # the thread is stopped while the memory that the thread works on is still there
            self._stop_thread = weakref.finalize(self, _stop, self._thread, os.getpid())

    @property
    def has_progress_thread(self) -> bool:
        """Whether a thread moves calls on."""
        return self._thread is not None

    def end_progress_thread(self) -> None:
        """Ends the thread, when no call is under way."""
        if self._thread is not None:
            self._thread = None
            self._stop_thread()

    @property
    def writes_past_caches(self) -> bool:
        """Whether this rank has found that its core shares no cache with the others'; see csrc/node/store_policy.h."""
        return bool(self.end.store_policy.streams)

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self._queue)

    def agree(self, signature: tuple[int, int]) -> Job:
        """Nothing but the agreement, which is a barrier."""
        return self._start(_node.job(signature, "agree", "uint8", 0), None)

    def reduce_like(
        self, kind: str, signature: tuple[int, int], send: ArrayView, receive: ArrayView | None, op: str, **options: Any
    ) -> Job:
        """Starts an allreduce, reduce or reduce_scatter; `send` and `receive` begin at one address or lie apart."""
        count = send.count if kind != "reduce_scatter" or receive is None else receive.count
        addresses = (send.address, 0 if receive is None else receive.address)
        return self._start(_node.job(signature, kind, send.dtype, count, addresses, op=op, **options), (send, receive))

    def allgather(self, signature: tuple[int, int], send: ArrayView, receive: ArrayView) -> Job:
        """Starts collecting everybody's bytes in rank order."""
        addresses = (send.address, receive.address)
        return self._start(_node.job(signature, "allgather", "uint8", send.nbytes, addresses), (send, receive))

    def broadcast(self, signature: tuple[int, int], memory: ArrayView, root: int) -> Job:
        """Starts copying root's bytes into everybody's `memory`."""
        addresses = (memory.address, memory.address)  # root only reads there, the others only write
        return self._start(_node.job(signature, "broadcast", "uint8", memory.nbytes, addresses, root=root), memory)

    def allreduce_list(
        self, signature: tuple[int, int], gather_list: GatherList, receive: ArrayView, divisor: float
    ) -> Job:
        """Starts the sum of what all ranks gather over `divisor`; the copy into shared memory is the packing.

        Args:
            signature: alike on all ranks.
            gather_list: what this rank gives; must not change before the job is done.
            receive: flat, apart from the segments; each element is cast to its dtype before it is added up.
            divisor: for each sum.
        """
        return self._start_list("allreduce", signature, gather_list, receive, divisor=divisor)

    def reduce_scatter_list(
        self, signature: tuple[int, int], gather_list: GatherList, receive: ArrayView, divisor: float, op: str = "sum"
    ) -> Job:
        """As `allreduce_list`, of gather lists with a block like `receive` for each rank, which gets its own block."""
        return self._start_list("reduce_scatter", signature, gather_list, receive, divisor=divisor, op=op)

    def _start_list(
        self, kind: str, signature: tuple[int, int], gather_list: GatherList, receive: ArrayView, **options: Any
    ) -> Job:
        struct = _node.job(signature, kind, receive.dtype, receive.count, (0, receive.address), **options)
        pointers = _node.pointers(gather_list.addresses)
        table, dtype, scale = gather_list.table.segments, gather_list.dtype, gather_list.scale
        _node.read_gather_list(struct, table, pointers, dtype, scale=scale)
        return self._start(struct, (pointers, gather_list, receive))

    def reduce_scatter_part(
        self, signature: tuple[int, int], source: ArrayView | GatherList, part: Part, out: ArrayView, op: str
    ) -> Job:
        """Starts the reduction of a part of the ranks' data, whose blocks go to the first ranks of the node.

        Args:
            signature: alike on all ranks.
            source: where this rank's data lie.
            part: alike on all ranks.
            out: for this rank's block; in the dtype in which the part is reduced.
            op: "sum" and the like.
        """
        address = source.address + part.start * source.itemsize if isinstance(source, ArrayView) else 0
        addresses = (address, out.address)
        job = _node.job(signature, "reduce_scatter", out.dtype, part.block, addresses, op=op, total=part.count)
        if isinstance(source, ArrayView):
            return self._start(job, (source, out))
        pointers, table = _node.pointers(source.addresses), source.table.segments
        _node.read_gather_list(job, table, pointers, source.dtype, scale=source.scale, base=part.start)
        return self._start(job, (pointers, source, out))

    def allgather_part(self, signature: tuple[int, int], mine: ArrayView, part: Part, receive: ArrayView) -> Job:
        """Starts collecting the blocks of a part, cut as for `reduce_scatter_part`, in their place in `receive`."""
        item = receive.itemsize
        addresses = (mine.address, receive.address + part.start * item)
        job = _node.job(signature, "allgather", "uint8", part.block * item, addresses, total=part.count * item)
        return self._start(job, (mine, receive))

    def give_up(self) -> None:
        """Makes sure that no rank takes a call for completed that this one gave up."""
        _node.give_up(self.end)

    def resume(self, struct: Any, kept: Any) -> Job:
        """Goes on with a call that was begun elsewhere, while none was under way here; `kept` owns its memory."""
        return self._start(struct, kept)

    def _start(self, struct: Any, kept: Any) -> Job:
        job = Job(self, struct, kept)
        self._queue.append(job)
        if self._thread is not None:
            _node.give(self._thread, struct)
        self.move(job, 0)  # other ranks need not wait until this rank asks for its result
        return job

    def move(self, job: Job, patience: int) -> bool:
        """Moves calls on in their order until `job` is done; returns whether it is."""
        queue, end, thread = self._queue, self.end, self._thread
        while queue:
            front = queue[0]
            if thread is None:
                progress = _node.advance(end, front.struct, patience)
            else:
                progress = _node.wait(thread, front.struct, patience)
            if progress == _node.WAITING:
                return False
            queue.popleft()
            front.end(differs=progress == _node.DIFFERS)
            if front is job:
                return True
        return job.done


def _stop(thread: Any, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has no such thread
        _node.stop_progress_thread(thread)
