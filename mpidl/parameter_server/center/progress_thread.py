"""The progress thread, which lets MPI serve other nodes while this rank computes.

Within a node both MPIs complete one-sided operations without the target's help. Between nodes, where the network cannot
do it alone, an operation moves on only when its target enters MPI: so a rank that holds a shard and has workers on
other nodes keeps a thread that enters MPI now and then, answers active messages, and sleeps in between.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np

from mpidl.mpi import exit_protocol, runtime
from mpidl.mpi.executor import ExecutorEndedError
from mpidl.mpi.topology import Topology
from mpidl.mpi.waiting import Attention
from mpidl.one_sided.message_server import MessageServer

_TAG = 9  # nothing is sent by it
_PAUSE = 1e-3  # seconds between two polls,
_SHORT_PAUSE = 5e-5  # and while data of other ranks keep coming
_said = False


def start_progress(ranks: Topology, name: str, messages: MessageServer | None) -> Progress | None:
    """Starts the thread if some of `ranks` are on other nodes than this one, or send it active messages.

    MPI must allow several threads at once (THREAD_MULTIPLE); where it was started with less, rank 0 says so, once.

    Args:
        ranks: those that can reach what this rank holds; their communicator stays open until the thread has ended.
        name: for messages.
        messages: the server of active messages; None: none are sent.
    """
    global _said
    if messages is None and ranks.placement.nodes.count(ranks.placement.nodes[ranks.rank]) == ranks.size:
        return None
    level = runtime.mpi_description()["thread_level"]
    if level == "multiple":
        return Progress(ranks, name, messages)
    if ranks.rank == 0 and not _said:
        _said = True
        exit_protocol.say(
            f"MPI was started with thread level {level!r}: there is no progress thread, and workers on other nodes may "
            "have to wait for a rank that computes; import mpidl before mpi4py.MPI, or use an MPI with threads"
        )
    return None


class Progress:
    """The thread of one center; it also ends when the main thread has ended, in whatever way."""

    def __init__(self, ranks: Topology, name: str, messages: MessageServer | None) -> None:
        mpi = runtime.mpi()
        # A receive that nothing is ever sent to, tested again and again: an incomplete Test always drives all of MPI's
        # progress, in both MPIs. An Iprobe does not: over UCX Open MPI then looks after one-sided traffic every
        # hundredth time only, and of a communicator of one rank MPICH never does.
        self._request = ranks.data.Irecv([np.empty(1, np.uint8), mpi.BYTE], source=ranks.rank, tag=_TAG)
        self._messages = messages
        if messages is not None:
            messages.begin_help()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, name=f"mpidl progress of {name}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Returns when the thread has ended; harmless the second time."""
        self._end.set()
        if self._messages is not None:
            self._messages.end_help()
        self._thread.join()
        if self._request is not None:
            self._request.Cancel()
            self._request.Wait()
            self._request = None

    def _poll(self) -> None:
        with suppress(ExecutorEndedError):
            self._serve()

    def _serve(self) -> None:
        attention, pause = Attention(), _PAUSE
        while not self._end.wait(pause) and threading.main_thread().is_alive():
            if self._messages is not None and self._messages.attended:
                pause = _PAUSE
                continue
            attention.test(self._request)
            while self._messages is not None and self._messages.serve():
                attention.note()
            pause = _SHORT_PAUSE if attention.expects_more() else _PAUSE
