"""Calls that a thread of its own makes while the main thread computes, one after the other.

The main thread looks for dead ranks while it waits for a call. The executor's thread must not: only one thread at a
time may receive the messages of the failure detector. Which calls are made is decided by the executor's users.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mpidl.errors import ClosedError

Result = TypeVar("Result")
_LOOK_EVERY = 0.02  # seconds
_LAST_MOMENT = 1.0  # seconds that a call has to notice that nobody waits for it any more


class ExecutorEndedError(Exception):
    """An executor's thread was to end while it waited."""


class Future(Generic[Result]):
    """One call."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._done = threading.Event()
        self._result: Result
        self._error: BaseException | None = None

    def run(self) -> None:
        """Makes the call, on the executor's thread."""
        try:
            self._result = self._call()
        except BaseException as error:  # it is who waits that it concerns
            self._error = error
        self._done.set()

    @property
    def failed(self) -> bool:
        """Whether it has raised."""
        return self._done.is_set() and self._error is not None

    def wait(self, look: Callable[[], None]) -> Result:
        """Returns what the call returned, or raises what it raised; `look` is called now and then meanwhile."""
        while not self._done.wait(_LOOK_EVERY):
            look()
        if self._error is not None:
            raise self._error
        return self._result


class Executor:
    """A thread that makes calls in order; being a daemon, it ends when the main thread has ended, in whatever way.

    Args:
        name: for messages.
    """

    def __init__(self, name: str) -> None:
        self._waiting: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self._thread = _Runner(self._run, f"mpidl executor of {name}")
        self._thread.start()

    def start(self, call: Callable[[], Result]) -> Future[Result]:
        """Has `call` made, after those that were asked for before.

        Raises:
            ClosedError: `end` was called.
        """
        if self._thread.given_up:
            raise ClosedError("exchanges cannot overlap any more: finish() was called, and its thread has ended")
        future = Future(call)
        self._waiting.put(future)
        return future

    def end(self) -> None:
        """Ends the thread; a call under way is given up where it waits. Harmless the second time."""
        self._thread.given_up = True
        self._waiting.put(None)
        self._thread.join(_LAST_MOMENT)  # one that is inside MPI stays there, and the job is about to be aborted

    def _run(self) -> None:
        while (future := self._waiting.get()) is not None:
            future.run()


class _Runner(threading.Thread):
    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self.given_up = False


def under_way() -> bool:
    """Returns whether this is an executor's thread.

    Raises:
        ExecutorEndedError: it is, and nobody waits for what it does any more.
    """
    thread = threading.current_thread()
    if isinstance(thread, _Runner) and thread.given_up:
        raise ExecutorEndedError
    return isinstance(thread, _Runner)
