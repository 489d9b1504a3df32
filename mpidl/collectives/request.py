"""Calls under way: `Request`, and the queue that drives a communicator's calls in the order in which they were made.

What a call does stands in `operations`; how a wait is carried out in `waiting`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from mpidl.collectives import Task
from mpidl.mpi import exit_protocol, runtime
from mpidl.mpi.topology import Topology
from mpidl.mpi.waiting import WaitGuard


class CallQueue:
    """One communicator's calls under way, oldest first.

    Attributes:
        calls: their requests.
    """

    def __init__(self) -> None:
        self.calls: deque[Request] = deque()

    def add(self, request: Request) -> Request:
        """Puts a call behind those that were made before it."""
        self.calls.append(request)
        return request

    def advance(self, *, block: bool = False, until: Request | None = None) -> None:
        """Drives the calls in the order in which they were made: the next starts when the one before has ended.

        That order is the same on all ranks, so no call's messages can be taken for another's, whichever request the
        user waits for first.
        """
        while self.calls and (until is None or not until.done):
            front = self.calls[0]
            if not front.step(block=block, look=until is not None):
                return
            self.calls.popleft()


class Request:
    """A non-blocking call under way, as `Communicator.iallreduce` returns it.

    The request owns the buffers of the call until the call has completed; neither may be touched before.

    Attributes:
        done: whether the call has completed.
    """

    def __init__(self, queue: CallQueue, ranks: Topology, name: str, task: Task, sequence: int = 0) -> None:
        self._queue, self._topology = queue, ranks
        self._name = name
        self._task: Task | None = task
        self._sequence = sequence
        self._begun = False
        self._pending: Any = None
        self._guard: WaitGuard | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._token = exit_protocol.opened(f"a call of {name} on {self._topology.name}")
        self.done = False

    def test(self) -> bool:
        """Moves the call on without blocking; returns whether the call has completed, be it with an error."""
        runtime.refuse_forked()
        self._queue.advance(until=self)
        return self.done

    def wait(self) -> Any:
        """Waits until the call has completed.

        Returns:
            What the blocking call returns: the result of `allreduce` for a request of `iallreduce`.

        Raises:
            MpidlError: as the blocking call does; the same error again when called again.
        """
        runtime.refuse_forked()
        self._queue.advance(block=True, until=self)
        if self._error is not None:
            raise self._error
        return self._result

    def step(self, *, block: bool, look: bool) -> bool:
        """Moves the call on; returns whether it has completed. Called by the communicator, in order.

        Args:
            block: wait until it has.
            look: whether the user waits for the call, if only by testing again and again: then look for missing ranks.
        """
        try:
            if not self._begun:
                self._sequence = self._sequence or self._topology.begin()
                self._begun = True
                self._resume()
            while not self.done:
                if not self._pending.Test():
                    if not look:
                        return False
                    self._guard = self._guard or self._topology.guard(self._name, self._sequence)
                    if not block:
                        self._guard.look()
                        return False
                    self._guard.wait(self._pending)
                self._pending = None
                self._resume()
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if interrupted or self._pending is not None:  # MPI may still write into what the task and the error hold
                self._topology.channel.give_up(self._name, (self._pending, self._task, error))
            self._end(None, error)
            if interrupted:
                raise
        return True  # wait() raises what was caught

    def _resume(self) -> None:
        assert self._task is not None
        try:
            self._pending = next(self._task)
        except StopIteration as stop:
            self._end(stop.value, None)

    def _end(self, result: Any, error: BaseException | None) -> None:
        self.done, self._result, self._error = True, result, error
        self._task = self._pending = None
        exit_protocol.closed(self._token)
