"""Dedicated servers: the last ranks of a communicator hold memory for the others, the workers, and do nothing else.

The first worker sends each server an order: open these windows, close those windows, end. Then workers and servers
together make the collectives that the order stands for. A server never reads or changes a window by itself: while it
tests for the next order MPI serves the windows, and between two tests it answers active messages.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpidl.errors import ArgumentError, MismatchError
from mpidl.mpi import exit_protocol, runtime, topology
from mpidl.mpi.agreement import disagreement
from mpidl.mpi.topology import Topology
from mpidl.mpi.waiting import Attention, Lookout
from mpidl.one_sided.locked_array import LockedArray
from mpidl.one_sided.message_server import MessageServer
from mpidl.one_sided.window import Plan, Window

_TAG = 8
_LONGEST = 8192  # bytes of an order
_OPEN, _CLOSE, _END = "open", "close", "end"
_PAUSE = 1e-2  # seconds between two looks for an order: next to no CPU time,
_PAUSE_FOR_OTHER_NODES = 1e-3  # and while workers of other nodes may need this rank's help to reach its windows


class DedicatedServers:
    """The servers as their workers see them.

    Args:
        whole: workers first, then servers; the servers are in `serve`.
        servers: how many.
    """

    def __init__(self, whole: Topology, servers: int) -> None:
        self.whole = whole
        self.servers = range(whole.size - servers, whole.size)  # their ranks, in `whole` and in what `open` returns
        self._numbers: dict[Topology, int] = {}
        self._opened = 0

    def open(self, name: str, plans: Sequence[Plan]) -> Topology:
        """Has the servers make windows; the caller must make the same, in this order. A collective of the workers.

        Returns:
            Workers and servers under a communicator of their own.
        """
        windows = {
            server: [
                [plan.name, plan.dtype, plan.counts[server], plan.shared, plan.reached[server : server + 1], plan.alone]
                for plan in plans
            ]
            for server in self.servers
        }
        self._send(lambda server: {"order": _OPEN, "name": name, "windows": windows[server]})
        ranks = self.whole.duplicate(f"{name} with its servers")
        self._numbers[ranks] = self._opened
        self._opened += 1
        return ranks

    def close(self, ranks: Topology) -> None:
        """Has the servers close what `open` opened, the last window first, and free `ranks`; the caller must too."""
        number = self._numbers.pop(ranks)
        self._send(lambda server: {"order": _CLOSE, "number": number})

    def end(self) -> None:
        """Ends the servers; a collective of the workers. They also end when all workers' programs have ended."""
        self._send(lambda server: {"order": _END})
        self.whole.free()

    def _send(self, order_for: Callable[[int], dict[str, Any]]) -> None:
        if self.whole.rank != 0:
            return
        mpi, sending = runtime.mpi(), []
        for server in self.servers:
            order = np.frombuffer(json.dumps(order_for(server)).encode(), np.uint8)
            assert order.size <= _LONGEST
            sending.append((order, self.whole.data.Isend([order, mpi.BYTE], dest=server, tag=_TAG)))
        requests = [request for _, request in sending]
        topology.wait_all(self.whole, requests, "an order to the servers", self.whole.channel.sequence, sending)


def agree_on_servers(whole: Topology, servers: int) -> None:
    """Refuses, alike on every rank, a number of servers that cannot be or differs between ranks; a collective."""
    found = [text.decode() for text in whole.gather_bytes(repr(servers).encode(), "agreeing on servers")]
    error: ArgumentError | MismatchError | None = None
    if len(set(found)) > 1:
        error = MismatchError(f"world: servers differs between ranks: {disagreement(found)}")
    elif type(servers) is not int or not 0 <= servers < whole.size:
        error = ArgumentError(
            f"servers={servers!r}: expected a whole number from 0 to {whole.size - 1}, so that of {whole.size} rank(s) "
            "one at least works"
        )
    if error is not None:
        whole.free()
        raise error


def serve(whole: Topology, workers: int) -> None:
    """Does what the workers order; returns when they have ended: by `DedicatedServers.end`, or each by its exit.

    Args:
        whole: workers first, then servers; this rank is a server.
        workers: how many.

    Raises:
        RankFailedError: another rank has died.
    """
    token = exit_protocol.opened(f"the serving of {workers} worker(s)")
    _Server(whole, workers).serve()
    exit_protocol.closed(token)


class _Server:
    """What one server holds."""

    def __init__(self, whole: Topology, workers: int) -> None:
        self._whole = whole
        self._workers = range(workers)
        nodes = whole.placement.nodes
        self._far = any(nodes[worker] != nodes[whole.rank] for worker in self._workers)
        self._held: dict[int, tuple[Topology, list[Window | LockedArray]]] = {}
        self._answering: dict[int, MessageServer] = {}
        self._opened = 0
        self._stop_passed_on = False
        self._lookout = Lookout(whole.channel, "the wait for an order: it serves")

    def serve(self) -> None:
        while (order := self._next()) is not None:
            if order["order"] == _OPEN:
                self._open(order)
            elif order["order"] == _CLOSE:
                self._close(order["number"])
            else:
                self._whole.free()
                return

    def _next(self) -> dict[str, Any] | None:
        """Returns the next order, or None when all workers' programs have ended."""
        mpi, buffer = runtime.mpi(), np.zeros(_LONGEST, np.uint8)
        status = mpi.Status()
        # Tested, not probed for: `parameter_server.center.progress_thread` says which calls let MPI serve the windows.
        request = self._whole.data.Irecv([buffer, mpi.BYTE], source=0, tag=_TAG)
        attention = Attention()
        while not attention.test(request, status):
            self._look()
            if all(self._whole.channel.has_left(worker) for worker in self._workers):
                request.Cancel()
                request.Wait()
                return None
            self._pass_on_stop()
            for messages in self._answering.values():
                if messages.serve():
                    attention.note()
            needed = bool(self._answering) or bool(self._held and self._far)
            if needed and attention.expects_more():
                os.sched_yield()
            else:
                time.sleep(_PAUSE_FOR_OTHER_NODES if needed else _PAUSE)
        order: dict[str, Any] = json.loads(buffer[: status.Get_count(mpi.BYTE)].tobytes())
        return order

    def _look(self) -> None:
        self._lookout.look(f"rank {self._whole.rank}, which serves, has lost others")

    def _pass_on_stop(self) -> None:
        """Tells the workers, once, that this rank was asked to stop: they save, and it serves until they have."""
        if exit_protocol.asked_to_stop() and not self._stop_passed_on:
            self._stop_passed_on = True
            self._whole.channel.ask_to_stop(self._workers)

    def _open(self, order: dict[str, Any]) -> None:
        ranks = self._whole.duplicate(f"{order['name']} with its servers")
        windows, messaged = [], []
        for name, dtype, count, shared, reached, alone in order["windows"]:
            counts = tuple(count if rank == ranks.rank else 0 for rank in range(ranks.size))
            made = Plan(name, dtype, counts, shared, tuple(reached) * ranks.size, alone).make(ranks)
            windows.append(made)
            if reached and isinstance(made, LockedArray):
                messaged.append(made)
        self._held[self._opened] = (ranks, windows)
        if messaged:
            self._answering[self._opened] = MessageServer(ranks, messaged, order["name"], self._look)
        self._opened += 1

    def _close(self, number: int) -> None:
        ranks, windows = self._held.pop(number)
        if number in self._answering:
            self._answering.pop(number).close()
        for window in reversed(windows):
            window.close()
        ranks.free()
