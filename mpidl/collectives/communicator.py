"""The public face of mpidl's collectives: `world`, `Communicator`, `Request`.

Arrays go in and arrays come out; the steps of each call stand in `operations`, MPI itself behind `topology`.
"""

from __future__ import annotations

from typing import Any

from mpidl.collectives import Collectives, Task, operations
from mpidl.collectives.request import CallQueue, Request
from mpidl.errors import ArgumentError, ClosedError
from mpidl.mpi import runtime, topology
from mpidl.mpi.topology import Topology
from mpidl.one_sided.dedicated_servers import DedicatedServers, agree_on_servers, serve

_world: Communicator | None = None
_served = False  # this rank was a server, and its workers have ended


def world(servers: int | None = None) -> Communicator:
    """Returns the communicator of all ranks that the launcher started; the first call starts MPI.

    The first call is a collective over all ranks: it duplicates MPI.COMM_WORLD, finds out which ranks share a node,
    and gives torch this rank's fair part of the cores. Later calls return the same object.

    With `servers=k` the last k ranks become dedicated servers: they hold the shards of the asynchronous optimisers
    inside this call, and their programs end in this call, with status 0, when all other ranks have ended. On the other
    ranks, the workers, the communicator holds the workers only.

    Args:
        servers: the number of dedicated servers, from 0 (every rank works and holds shards) to the number of ranks less
            one. None: the number of the first call, or 0.

    Raises:
        ArgumentError: `servers` is no such number, or an earlier call had another number.
        MismatchError: `servers` differs between ranks.
        ClosedError: this rank was a server, and its work is done.
        ForkedError: the calling process is a child that was made by fork or multiprocessing.
        NoMPIError: no MPI library was found.
        SystemExit: on a server, when its work is done.
    """
    global _world, _served
    runtime.mpi()  # refuses forked children even when the world is cached
    if _served:
        raise ClosedError("world: this rank served, and its workers have ended")
    if _world is None:
        whole = topology.start_world()
        agree_on_servers(whole, 0 if servers is None else servers)
        made = split_servers(whole, servers or 0)
        if made is None:
            _served = True
            raise SystemExit(0)
        runtime.set_torch_threads(made.topology.ranks_on_my_cores())
        _world = made
    elif servers not in (None, _world.servers):
        raise ArgumentError(f"servers={servers!r}: mpidl.world() was called before, with servers={_world.servers}")
    return _world


def split_servers(whole: Topology, servers: int) -> Communicator | None:
    """Makes the last ranks of `whole` servers of the others; a collective.

    Returns:
        The workers' communicator; on a server None, when the workers have ended.
    """
    workers = whole.size - servers
    if servers == 0:
        return Communicator._over(whole)
    if whole.rank >= workers:
        serve(whole, workers)
        return None
    return Communicator._over(whole.subset(tuple(range(workers)), whole.name, 0), DedicatedServers(whole, servers))


class Communicator:
    """A group of ranks and its collectives, on numpy arrays, torch tensors and cupy arrays.

    Every method is a collective: all ranks of the communicator make the same calls in the same order. A result is of
    the kind, dtype and device of the array that was given, and detached from autograd. float16 and bfloat16 are reduced
    in float32. An array on a device goes through pinned host memory (MPIDL_CUDA_AWARE may say otherwise), in the order
    of the stream that is current for its kind, and the result is written in that order too. A call that differs between
    ranks raises `MismatchError` on all ranks. If a rank never makes a call, the call raises `StalledError` on the other
    ranks after MPIDL_TIMEOUT seconds, or as soon as that rank has died. Calls from several threads at once are not
    supported.

    Args:
        mpi_comm: an `mpi4py.MPI.Intracomm`, which is duplicated and stays the caller's. The constructor is collective.

    Raises:
        ArgumentError: `mpi_comm` is MPI.COMM_NULL or an intercommunicator, or an environment variable makes no sense.
        DtypeError: `mpi_comm` is no communicator of mpi4py.

    Attributes:
        rank: this rank, from 0 to size - 1.
        size: number of ranks.
        nodes: number of nodes over which the ranks are spread.
        servers: number of dedicated servers, further ranks that only hold shards for these; see `world`.
        dedicated_servers: how optimisers reach those servers; None where there are none.
        node: communicator of the ranks that share this rank's node and memory.
        lane: communicator of the ranks that stand at this rank's place within their own nodes.
    """

    def __init__(self, mpi_comm: Any) -> None:
        self._set_up(topology.start(mpi_comm, getattr(mpi_comm, "name", "") or "a communicator"))

    @classmethod
    def _over(cls, ranks: Topology, dedicated_servers: DedicatedServers | None = None) -> Communicator:
        made = cls.__new__(cls)
        made._set_up(ranks, dedicated_servers)
        return made

    def _set_up(self, ranks: Topology, dedicated_servers: DedicatedServers | None = None) -> None:
        self._topology = ranks
        try:
            self._collectives = Collectives(ranks, directly=True)
        except Exception:  # the same on every rank
            ranks.free()
            raise
        self.dedicated_servers = dedicated_servers
        self.servers = len(dedicated_servers.servers) if dedicated_servers is not None else 0
        self._queue = CallQueue()
        self.rank, self.size = ranks.rank, ranks.size
        self.nodes = len(set(ranks.placement.nodes))
        self._parts: list[Communicator] = []
        self.node = self._part(ranks.node_ranks(), "node", 1)
        self.lane = self._part(ranks.lane_ranks(), "lane", 2)

    def _part(self, ranks: tuple[int, ...], name: str, tag: int) -> Communicator:
        """Returns a communicator of some ranks, or this one if `ranks` are all: the node of a node is itself."""
        if len(ranks) == self.size:
            return self
        part = Communicator._over(self._topology.subset(ranks, f"{name} of {self._topology.name}", tag))
        self._parts.append(part)
        return part

    @property
    def shares_memory(self) -> bool:
        """Whether the ranks exchange data through memory that all of them share; otherwise MPI moves it."""
        return self._collectives.node is not None

    @property
    def topology(self) -> Topology:
        """The ranks as mpidl's other packages use them; not for users."""
        return self._topology

    def allreduce(self, x: Any, op: str = "sum", out: Any = None) -> Any:
        """Reduces the arrays of all ranks element by element and returns the result on every rank.

        Args:
            x: array of any shape, with floating point, complex or integer elements, alike in dtype and number of
                elements on all ranks; a non-contiguous array is copied first.
            op: "sum", "mean" (the sum divided by `size`, before it is rounded to the dtype), "min", "max" or "prod".
                min and max with a NaN are NaN, as in numpy; of 0 and -0 either one, the same on all ranks.
            out: array of the shape, dtype and device of x for the result; `out=x` works in place. None: a new array.

        Returns:
            `out`, or a new array of the shape, dtype and device of x.

        Raises:
            ArgumentError: op is unknown, or out does not fit x or is read-only.
            DtypeError: the dtype cannot be reduced by op; integers have no mean, complex numbers no order.
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        if out is not None and self._collectives.fast_path is not None and not self._queue.calls:
            runtime.mpi()  # refuses forked children
            done = self._collectives.fast_path.allreduce(x, op, out)
            if done is True:
                return out
            if done:
                sequence, task = done
                return self._queue.add(Request(self._queue, self._topology, "allreduce", task, sequence)).wait()
        return self._start("allreduce", operations.allreduce(self._collectives, x, op, out)).wait()

    def iallreduce(self, x: Any, op: str = "sum", out: Any = None) -> Request:
        """Starts an `allreduce` and returns at once.

        Args:
            x, op, out: as for `allreduce`; x must not be changed, and out must not be read or changed, until the
                request has completed.

        Returns:
            The request, whose `wait()` returns what `allreduce` returns and raises what `allreduce` raises.
        """
        return self._start("iallreduce", operations.allreduce(self._collectives, x, op, out))

    def reduce(self, x: Any, op: str = "sum", root: int = 0, out: Any = None) -> Any:
        """Reduces the arrays of all ranks element by element and returns the result on rank `root`.

        Args:
            x: array of any shape, alike in dtype and number of elements on all ranks.
            op: "sum", "mean", "min", "max" or "prod".
            root: the rank that gets the result, from 0 to size - 1; alike on all ranks.
            out: array like x for the result, on rank `root`; None: a new array.

        Returns:
            On rank `root` `out`, or a new array like x; None on the other ranks.

        Raises:
            ArgumentError: op or root is unknown, or out does not fit x or is read-only.
            DtypeError: the dtype cannot be reduced by op.
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        return self._start("reduce", operations.reduce(self._collectives, x, op, root, out)).wait()

    def reduce_scatter(self, x: Any, op: str = "sum") -> Any:
        """Reduces the arrays of all ranks and leaves each rank one block of the result.

        Args:
            x: array of shape (size * n, ...), alike in dtype and number of elements on all ranks: `size` blocks of n.
            op: "sum", "mean", "min", "max" or "prod".

        Returns:
            Block number `rank` of the reduced array, a new array of shape (n, ...).

        Raises:
            ArgumentError: op is unknown, or the first dimension of x is no multiple of `size`.
            DtypeError: the dtype cannot be reduced by op.
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        return self._start("reduce_scatter", operations.reduce_scatter(self._collectives, x, op)).wait()

    def broadcast(self, x: Any, root: int = 0) -> Any:
        """Copies the array of rank `root` into the array of every rank, in place, and returns x.

        Args:
            x: array of any shape and dtype, alike in dtype and number of elements on all ranks; written on all ranks
                but `root`.
            root: the rank whose array is copied, from 0 to size - 1; alike on all ranks.

        Raises:
            ArgumentError: root is unknown, or x is read-only.
            DtypeError: x is no array that mpidl knows.
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        return self._start("broadcast", operations.broadcast(self._collectives, x, root)).wait()

    def allgather(self, x: Any) -> Any:
        """Collects the arrays of all ranks on every rank.

        Args:
            x: array of any shape and dtype, alike in both on all ranks.

        Returns:
            A new array of shape (size, *x.shape): the arrays in rank order.

        Raises:
            DtypeError: x is no array that mpidl knows.
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        return self._start("allgather", operations.allgather(self._collectives, x)).wait()

    def alltoall(self, x: Any) -> Any:
        """Sends block r of x to rank r, for every r, and collects the blocks that the other ranks send to this one.

        Args:
            x: array of shape (size * n, ...) and any dtype, alike on all ranks: `size` blocks of n.

        Returns:
            A new array of the shape of x: the blocks received, in rank order.

        Raises:
            ArgumentError: the first dimension of x is no multiple of `size`.
            DtypeError: x is no array that mpidl knows.
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        return self._start("alltoall", operations.alltoall(self._collectives, x)).wait()

    def barrier(self) -> None:
        """Returns when all ranks have called `barrier`.

        Raises:
            MismatchError, StalledError: another rank made a different call, or has left, has died or did not come.
        """
        self._start("barrier", operations.barrier(self._collectives)).wait()

    def free(self) -> None:
        """Gives the communicator back to MPI, with its `node` and `lane`; a collective.

        Raises:
            ArgumentError: a request is still under way, or this is `mpidl.world()`, which lives as long as MPI.
        """
        if self._queue.calls:
            raise ArgumentError(f"free: {len(self._queue.calls)} request(s) still under way; wait for them first")
        if self is _world:
            raise ArgumentError("free: mpidl.world() lives as long as MPI")
        for part in self._parts:
            part.free()
        self._topology.free()
        if self.dedicated_servers is not None:
            self.dedicated_servers.end()

    def __repr__(self) -> str:
        return f"<mpidl.Communicator {self._topology.name}: rank {self.rank} of {self.size}, nodes {self.nodes}>"

    def _start(self, name: str, task: Task) -> Request:
        runtime.mpi()  # refuses forked children
        request = self._queue.add(Request(self._queue, self._topology, name, task))
        self._queue.advance()
        return request
