"""torch.distributed's gloo on the ranks that MPI started: the peer that every user of PyTorch has."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mpidl.cli.bench.ranks import Together

# A process group's destructor joins its threads while it holds the GIL; one that still drops what the last call
# left may need the GIL, and then neither goes on. Kept, none is destroyed before the process ends.
_kept: list[Any] = []


def available() -> bool:
    """Returns whether this torch has gloo."""
    return dist.is_available() and dist.is_gloo_available()


def free_port(ranks: Together) -> tuple[str, int]:
    """Returns the loopback's address and a port of it that nobody used a moment ago; a collective."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        host, port = ranks.everywhere(found.getsockname())[0]
    return host, port


@contextmanager
def process_group(ranks: Together) -> Iterator[None]:
    """torch's default process group exists inside, with MPI's rank numbers; a collective. Nothing without gloo.

    Rank 0 keeps the rendezvous on a port that the system chose. On one node everything goes over the loopback.
    """
    if not available():
        yield
        return
    one_node = ranks.comm.nodes == 1
    if one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead nowhere
    host = "127.0.0.1" if one_node else socket.gethostname()
    first = ranks.rank == 0
    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # public, though its module does not say so
    store = tcp_store(host, 0, ranks.size, is_master=True, wait_for_workers=False) if first else None
    host, port = ranks.everywhere([host, store.port if store is not None else 0])[0]
    if store is None:
        store = tcp_store(host, port, ranks.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.size)
    try:
        yield
        dist.barrier()
    finally:
        _kept.append(dist.group.WORLD)
        dist.destroy_process_group()
