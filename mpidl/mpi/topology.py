"""Communicators as mpidl holds them: two duplicates, who shares a node, raw non-blocking operations on flat memory.

Arrays, mismatch checks and results belong to `communicator`; how a wait is carried out to `waiting`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mpidl.arrays.view import ArrayView
from mpidl.errors import ArgumentError, DtypeError
from mpidl.mpi import datatypes, failure_detector, runtime
from mpidl.mpi.failure_detector import Channel, Limits
from mpidl.mpi.placement import Link, Placement
from mpidl.mpi.processes import Process, start_time
from mpidl.mpi.waiting import WaitGuard, poll
from mpidl.native import environment

_PIECE = 1 << 30  # elements (or bytes) per MPI call: counts of MPI-3 bindings end at 2^31 - 1


class Topology:
    """A communicator of mpidl's own: `data` for arrays, `control` for small words, a channel for the failure detector.

    Making one is a collective. It is freed by `free`, a collective too, and never by the garbage collector.
    """

    def __init__(
        self, mpi: Any, parent: Any, name: str, placement: Placement | None = None, channel: Channel | None = None
    ) -> None:
        self._mpi = mpi
        self.name = name
        limits = failure_detector.limits()
        self.data = _duplicate(parent, name, channel, limits)
        self.control = _duplicate(parent, name, channel, limits)
        self.rank: int = self.data.rank
        self.size: int = self.data.size
        self.channel = Channel(mpi, self.control, name, limits)
        self.placement = placement or self._place()
        self.link: Link | None = None  # measured by `cost_model` when needed; parts and duplicates inherit it
        self.channel.know(self.placement.processes)

    def duplicate(self, name: str) -> Topology:
        """Returns the same ranks under communicators of their own; a collective."""
        made = Topology(self._mpi, self.data, name, self.placement, self.channel)
        made.link = self.link
        return made

    def subset(self, ranks: tuple[int, ...], name: str, tag: int) -> Topology:
        """Returns a topology of some ranks; a collective of those ranks only.

        Args:
            ranks: members, in the order that gives their new ranks; this rank is among them.
            name: for messages.
            tag: tells apart subsets that are made at the same time.
        """
        group = self.data.Get_group()
        chosen = group.Incl(list(ranks))
        comm = self.data.Create_group(chosen, tag)
        chosen.Free()
        group.Free()
        place = self.placement
        numbers = {node: i for i, node in enumerate(dict.fromkeys(place.nodes[r] for r in ranks))}
        placement = Placement(
            nodes=tuple(numbers[place.nodes[r]] for r in ranks),
            processes=tuple(place.processes[r] for r in ranks),
            cores=tuple(place.cores[r] for r in ranks),
        )
        made = Topology(self._mpi, comm, name, placement)
        made.link = self.link
        comm.Free()
        return made

    def node_ranks(self) -> tuple[int, ...]:
        """Returns the ranks that share this rank's node, in order."""
        mine = self.placement.nodes[self.rank]
        return tuple(r for r in range(self.size) if self.placement.nodes[r] == mine)

    def lane_ranks(self) -> tuple[int, ...]:
        """Returns the ranks that stand at this rank's place within their own nodes, in order."""
        place, seen, lane = self.node_ranks().index(self.rank), dict[int, int](), []
        for rank, node in enumerate(self.placement.nodes):
            if seen.get(node, 0) == place:
                lane.append(rank)
            seen[node] = seen.get(node, 0) + 1
        return tuple(lane)

    def ranks_on_my_cores(self) -> int:
        """Returns how many ranks of this node, this one included, may run on this rank's cores."""
        mine = self.placement.cores[self.rank]
        return sum(1 for rank in self.node_ranks() if self.placement.cores[rank] & mine)

    def spares_cores(self) -> bool:
        """Whether a progress thread has a core to itself; MPIDL_HELPER may decide otherwise."""
        wish = environment.HELPER.read()
        return self.ranks_on_my_cores() < len(self.placement.cores[self.rank]) if wish is None else wish

    def free(self) -> None:
        """Gives both communicators back; a collective, harmless the second time.

        Does nothing after a call that was given up half-way: MPI still works on it.
        """
        if self.data is not None and self.channel.given_up is None:
            self._drain()
            self.channel.free()
            data, self.data = self.data, None
            data.Free()

    def _drain(self) -> None:
        """Takes in every message of the failure detector that was ever sent here.

        MPI gives the number of a freed communicator to the next one, of other ranks, and a message left over would
        arrive there: MPICH finds a rank that cannot be, Open MPI writes past the end of its tables.
        """
        sequence = self.begin()
        sent = self.channel.close()
        expected = np.empty_like(sent)
        request = self.control.Ialltoall(sent, expected)
        self.wait(request, "freeing a communicator", sequence)
        self.guard("freeing a communicator", sequence).until(lambda: self.channel.drained(expected), request)

    # Waiting.

    def begin(self) -> int:
        """Counts one more call on this topology; see `Channel.begin`."""
        return self.channel.begin()

    def guard(self, what: str, sequence: int) -> WaitGuard:
        """Returns what a wait in call number `sequence` does between two tests of its request; its time begins now."""
        return WaitGuard(self.channel, what, sequence)

    def wait(self, request: Any, what: str, sequence: int) -> None:
        """Returns when `request` has completed; see `WaitGuard.wait`."""
        if not request.Test():
            self.guard(what, sequence).wait(request)

    def barrier(self, what: str) -> None:
        """A polled barrier on the control communicator."""
        sequence = self.begin()
        self.wait(self.control.Ibarrier(), what, sequence)

    # Words of agreement: small numpy arrays on the control communicator.

    def start_words_minimum(self, send: np.ndarray[Any, Any], receive: np.ndarray[Any, Any]) -> Any:
        """Starts an elementwise minimum of a few int64 words over all ranks; both arrays must outlive it."""
        return self.control.Iallreduce(send, receive, self._mpi.MIN)

    def start_words_gather(self, send: np.ndarray[Any, Any], receive: np.ndarray[Any, Any]) -> Any:
        """Starts collecting every rank's words, alike in length, on every rank; both arrays must outlive it."""
        return self.control.Iallgather(send, receive)

    def gather_words(self, words: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
        """Returns every rank's words, shape (size, len(words)); a polled collective."""
        everyone = np.empty((self.size, words.size), words.dtype)
        sequence = self.begin()
        self.wait(self.start_words_gather(words, everyone), what, sequence)
        return everyone

    def gather_bytes(self, payload: bytes, what: str) -> list[bytes]:
        """Returns every rank's bytes, of any length; two polled collectives."""
        lengths = self.gather_words(np.array([len(payload)], np.int64), what)[:, 0]
        longest = int(lengths.max())
        mine = np.zeros(longest, np.uint8)
        mine[: len(payload)] = np.frombuffer(payload, np.uint8)
        everyone = self.gather_words(mine, what)
        return [everyone[r, : lengths[r]].tobytes() for r in range(self.size)]

    # Raw operations on flat memory, started piece by piece and waited for by the caller.

    def start_allreduce(self, send: ArrayView, receive: ArrayView, op: str) -> list[Any]:
        """Starts the reduction of `send` into `receive` (distinct memory, same count and dtype) on every rank."""
        mpi_op = datatypes.mpi_operation(self._mpi, op)
        return [
            self.data.Iallreduce(self._elements(send, at, count), self._elements(receive, at, count), mpi_op)
            for at, count in _pieces(send.count)
        ]

    def start_reduce(self, send: ArrayView, receive: ArrayView | None, op: str, root: int) -> list[Any]:
        """Starts the reduction of `send` into `receive` on `root`; elsewhere `receive` is None."""
        mpi_op = datatypes.mpi_operation(self._mpi, op)
        return [
            self.data.Ireduce(
                self._elements(send, at, count),
                None if receive is None else self._elements(receive, at, count),
                mpi_op,
                root,
            )
            for at, count in _pieces(send.count)
        ]

    def start_reduce_scatter(self, send: ArrayView, receive: ArrayView, op: str) -> list[Any]:
        """Starts the reduction of `send`, of size equal blocks, block r of which lands in `receive` on rank r."""
        self._refuse_large("reduce_scatter", send.count)
        whole, block = self._elements(send, 0, send.count), self._elements(receive, 0, receive.count)
        whole[1] = receive.count  # mpi4py wants the count of one block here
        return [self.data.Ireduce_scatter_block(whole, block, datatypes.mpi_operation(self._mpi, op))]

    def start_broadcast(self, memory: ArrayView, root: int) -> list[Any]:
        """Starts the copy of root's bytes into everybody's `memory`."""
        return [self.data.Ibcast(self._bytes(memory, at, n), root) for at, n in _pieces(memory.nbytes)]

    def start_allgather(self, send: ArrayView, receive: ArrayView) -> list[Any]:
        """Starts collecting everybody's `send` in rank order in `receive`."""
        self._refuse_large("allgather", receive.nbytes)
        return [self.data.Iallgather(self._bytes(send, 0, send.nbytes), self._bytes(receive, 0, receive.nbytes))]

    def start_alltoall(self, send: ArrayView, receive: ArrayView) -> list[Any]:
        """Starts sending block r of `send` to rank r and collecting the blocks that come back, in rank order."""
        self._refuse_large("alltoall", receive.nbytes)
        return [self.data.Ialltoall(self._bytes(send, 0, send.nbytes), self._bytes(receive, 0, receive.nbytes))]

    def start_send(self, address: int, nbytes: int, rank: int, tag: int) -> Any:
        """Starts sending raw bytes to one rank; they arrive in the order in which they were sent with that tag."""
        return self.data.Isend([self._mpi.buffer.fromaddress(address, nbytes), self._mpi.BYTE], rank, tag)

    def start_receive(self, address: int, nbytes: int, rank: int, tag: int) -> Any:
        """Starts receiving raw bytes from one rank."""
        return self.data.Irecv([self._mpi.buffer.fromaddress(address, nbytes), self._mpi.BYTE], rank, tag)

    def _elements(self, memory: ArrayView, offset: int, count: int) -> list[Any]:
        start = memory.address + offset * memory.itemsize
        buffer = self._mpi.buffer.fromaddress(start, count * memory.itemsize)
        return [buffer, count, datatypes.mpi_datatype(self._mpi, memory.dtype)]

    def _bytes(self, memory: ArrayView, offset: int, nbytes: int) -> list[Any]:
        return [self._mpi.buffer.fromaddress(memory.address + offset, nbytes), self._mpi.BYTE]

    def _refuse_large(self, what: str, count: int) -> None:
        if count > 2**31 - 1:
            raise ArgumentError(f"{what}: {count} exceeds MPI's count limit of 2147483647; split the array")

    def _place(self) -> Placement:
        """Finds out who shares a node; MPIDL_NODE_SIZE=k pretends that nodes have k ranks each."""
        shared = self.data.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        lowest = np.array(self.rank, np.int64)
        shared.Allreduce(self._mpi.IN_PLACE, lowest, self._mpi.MIN)
        place = shared.rank
        shared.Free()
        node_size = environment.NODE_SIZE.read()
        part = place // node_size if node_size else 0
        own = start_time(os.getpid()) or 0
        words = self.gather_words(np.array([int(lowest), part, os.getpid(), own], np.int64), "finding nodes")
        keys = [(int(host), int(piece)) for host, piece, _, _ in words]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        processes = tuple(
            Process(int(pid), int(start), int(host) == int(lowest) and start_time(int(pid)) == int(start))
            for host, _, pid, start in words
        )
        masks = self.gather_bytes(",".join(map(str, sorted(runtime.cores()))).encode(), "finding cores")
        cores = tuple(frozenset(int(core) for core in mask.split(b",")) for mask in masks)
        return Placement(tuple(numbers[key] for key in keys), processes, cores)


def start(mpi_comm: Any, name: str) -> Topology:
    """Returns a topology over the ranks of `mpi_comm`, which stays the caller's; a collective."""
    mpi = runtime.mpi()
    if not isinstance(mpi_comm, mpi.Comm):
        raise DtypeError(f"mpi_comm is a {type(mpi_comm).__name__}; expected an mpi4py.MPI.Intracomm")
    if mpi_comm == mpi.COMM_NULL:
        raise ArgumentError("mpi_comm is MPI.COMM_NULL: this rank is not a member")
    if mpi_comm.Is_inter():
        raise ArgumentError("mpi_comm is an intercommunicator; expected an intracommunicator")
    return Topology(mpi, mpi_comm, name)


def start_world() -> Topology:
    """Returns a topology over the ranks of MPI.COMM_WORLD, starting MPI where needed; a collective."""
    world = start(runtime.mpi().COMM_WORLD, "world")
    world.channel.last()
    return world


def wait_all(topology: Topology, requests: list[Any], what: str, sequence: int, memory: object) -> None:
    """Waits for several requests, in order; `memory`, on which they work, is kept if a wait is given up."""
    for request in requests:
        if not request.Test():
            topology.guard(what, sequence).wait(request, (requests, memory))


def _duplicate(parent: Any, name: str, channel: Channel | None, limits: Limits) -> Any:
    """MPI writes the new handle into `made` when the request completes: a wait that is given up must keep both."""
    what = f"making the communicator {name}"
    if channel is None:
        made, request = parent.Idup()
        poll(request, what, limits.give_up, (made, request))
    else:
        guard = WaitGuard(channel, what, channel.begin())
        made, request = parent.Idup()
        guard.until(request.Test, (made, request))
    return made


def _pieces(count: int) -> list[tuple[int, int]]:
    return [(at, min(_PIECE, count - at)) for at in range(0, count, _PIECE)]
