"""Parameter servers that others have: a process that does nothing else takes each commit and sends the center back.

By two-sided MPI, as mpi_learn's master does it, and by torch RPC. The first rank serves, the others work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from mpidl.cli.bench import gloo, targets
from mpidl.cli.bench.commits import SCALE, Way
from mpidl.cli.bench.ranks import Together
from mpidl.mpi import runtime

_held: list[torch.Tensor] = []  # the center, in the process that serves by RPC
_lock = threading.Lock()


class _Master(Way):
    """Send of the commit, Recv of the center."""

    name = targets.MASTER

    def __init__(self, ranks: Together, count: int) -> None:
        super().__init__(ranks, count, first=0)
        self._raw, self._mpi = ranks.raw, runtime.mpi()
        self._delta = np.empty_like(self._moved)
        self._center: NDArray[np.float32] = np.zeros_like(self._moved)

    def exchange(self) -> None:
        np.multiply(self._moved, np.float32(SCALE), out=self._delta)
        self._raw.Send([self._delta, self._mpi.FLOAT], dest=0)
        self._raw.Recv([self._center, self._mpi.FLOAT], source=0)

    def serve(self) -> None:
        status = self._mpi.Status()
        for _ in range(self._workers.size - 1):
            self._raw.Recv([self._delta, self._mpi.FLOAT], status=status)
            self._center += self._delta
            self._raw.Send([self._center, self._mpi.FLOAT], dest=status.Get_source())

    def center(self) -> NDArray[np.float32]:
        self._raw.Bcast([self._center, self._mpi.FLOAT], root=0)
        return self._center


class _Rpc(Way):
    """A remote call that adds and returns the center."""

    name = targets.RPC

    def __init__(self, ranks: Together, count: int) -> None:
        super().__init__(ranks, count, first=0)
        self._delta = torch.empty(count)
        _held[:] = [torch.zeros(count)]

    def exchange(self) -> None:
        torch.mul(torch.from_numpy(self._moved), SCALE, out=self._delta)
        _held[:] = [dist.rpc.rpc_sync("0", _add_and_return, args=(self._delta,))]

    def center(self) -> NDArray[np.float32]:
        if self._workers.rank:
            _held[:] = [dist.rpc.rpc_sync("0", _add_and_return, args=(torch.zeros(1),))]
        found: NDArray[np.float32] = _held[0].numpy()
        return found


def _add_and_return(delta: torch.Tensor) -> torch.Tensor:
    with _lock:
        _held[0].add_(delta)
        return _held[0].clone()  # it is sent behind the lock, while others add


@contextmanager
def ways(ranks: Together, count: int) -> Iterator[list[Way]]:
    """Yields both, or without torch RPC the first; a collective."""
    with _rpc(ranks) as there:
        yield [_Master(ranks, count), *([_Rpc(ranks, count)] if there else [])]


@contextmanager
def _rpc(ranks: Together) -> Iterator[bool]:
    """torch RPC runs inside, where this torch has it; a collective."""
    if not (dist.is_available() and dist.rpc.is_available()) or ranks.comm.nodes > 1:
        yield False
        return
    host, port = gloo.free_port(ranks)
    options = dist.rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://{host}:{port}", rpc_timeout=60)
    dist.rpc.init_rpc(  # type: ignore[no-untyped-call]
        str(ranks.rank), rank=ranks.rank, world_size=ranks.size, rpc_backend_options=options
    )
    try:
        yield True
    finally:
        dist.rpc.shutdown()
        _held.clear()
