"""How a rank leaves: what is still open, why it failed, and what ends the others.

A rank may leave quietly only if nothing is open and nothing failed. Otherwise the `atexit` handler below prints what
was left and aborts the whole job, since the other ranks would wait for ever. `sys.excepthook` alone would not do:
`sys.exit()` and console scripts never reach it. Which MPI call aborts, and how peers are told of a quiet leave, is
given by `runtime` and `topology`; this file knows no MPI.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType, TracebackType
from typing import Any, NoReturn

_GRACE = 3.0  # seconds that other threads get to end, a writer of checkpoints say, after an uncaught exception
_SAME_REQUEST = 1.0  # seconds within which a second signal to stop is taken for an echo of the first

_open: dict[int, str] = {}
_tokens = itertools.count(1)
_quiet_leave: list[Callable[[], None]] = []
_failure: str | None = None  # an uncaught exception or a fatal signal: ends the job at exit
_on_stop: Callable[[], None] | None = None  # what the program does when it is asked to stop
_stop_asked = False
_thread_failure: str | None = None  # for the next step header; the main thread may still end well
_pid = 0
_abort: Callable[[int], None] | None = None
_who = "rank ?"


def install(who: str, abort: Callable[[int], None]) -> None:
    """Registers the handlers; called once per process, when MPI starts, by `runtime`.

    Args:
        who: how this rank is named in messages, such as "rank 1 of 4".
        abort: ends the job on all ranks with the given status; does not return.
    """
    global _pid, _abort, _who
    _pid, _abort, _who = os.getpid(), abort, who
    atexit.register(_at_exit)
    _wrap_excepthook()
    _wrap_threading_excepthook()
    _wrap_os_exit()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def opened(what: str) -> int:
    """Notes that `what` must be closed before this rank may leave quietly; returns a token for `closed`."""
    token = next(_tokens)
    _open[token] = what
    return token


def closed(token: int) -> None:
    """Takes back `opened`; harmless when called twice."""
    _open.pop(token, None)


def before_quiet_leave(callback: Callable[[], None]) -> None:
    """Calls `callback` when this rank leaves with nothing open and nothing failed."""
    _quiet_leave.append(callback)


def leave_quietly() -> None:
    """Does what a quiet leave begins with, if this rank may leave so; harmless the second time."""
    if _failure is None and not _open:
        for callback in _quiet_leave:
            callback()


def thread_failure() -> str | None:
    """Returns what ended a thread of this process, or None."""
    return _thread_failure


def mark_failed(reason: str) -> None:
    """Makes the exit of this rank abort the job, with `reason` printed."""
    global _failure
    _failure = _failure or reason


def on_stop_signal(callback: Callable[[], None]) -> None:
    """Calls `callback` on the first SIGTERM, SIGUSR1 or SIGINT; one that comes a second later ends the job at once.

    One request may arrive twice within moments: the batch system signals both the launcher, which passes it on, and
    the ranks. Children made by fork behave as if there were no handler.
    """
    global _on_stop
    _on_stop = callback
    pid, first = os.getpid(), list[float]()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            _default(number)
        elif not first:
            first.append(time.monotonic())
            ask_to_stop()
        elif time.monotonic() - first[0] > _SAME_REQUEST:
            _end_at_once(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handler)


def ask_to_stop() -> None:
    """Does what a first signal to stop does; called when another rank passes on its own."""
    global _stop_asked
    _stop_asked = True
    if _on_stop is not None:
        _on_stop()


def asked_to_stop() -> bool:
    """Returns whether this rank was asked to stop, in a program that does so on request."""
    return _stop_asked


def say(text: str) -> None:
    """Writes one line to standard error, in one system call so that lines of several ranks do not mix."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, a broken pipe, or None
            stream.flush()
    try:
        os.write(2, f"mpidl: {text}\n".encode())
    except OSError:  # standard error is closed: there is nobody to tell
        return


def _at_exit() -> None:
    if os.getpid() != _pid or _abort is None:
        return  # a forked child: the MPI state belongs to its parent
    if _failure is None and not _open:
        try:
            leave_quietly()
            return
        except BaseException as error:  # a signal, while this rank waits for the others
            mark_failed(_named(type(error), error))
    reasons = [_failure] if _failure else []
    if _open:
        reasons.append("still open: " + "; ".join(_open.values()))
    _end_job(f"leaves too early ({'; '.join(reasons)})", 1)


def _end_job(what: str, status: int) -> None:
    say(f"{_who} {what}: ending the job on all ranks")
    time.sleep(0.1)  # the launcher forwards output through pipes; MPI_Abort may overtake it
    assert _abort is not None
    _abort(status)


def _wrap_excepthook() -> None:
    previous = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        mark_failed(_named(kind, value))
        previous(kind, value, trace)
        _end_although_threads_run()

    sys.excepthook = hook


def _end_although_threads_run() -> None:
    """Ends the job now if the interpreter would wait for other threads for ever before any `atexit` handler."""
    until = time.monotonic() + _GRACE
    for thread in threading.enumerate():
        if os.getpid() == _pid and not thread.daemon and thread is not threading.main_thread():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                say(f"thread {thread.name} still runs after {_GRACE:g} s")
                _at_exit()


def _wrap_threading_excepthook() -> None:
    previous = threading.excepthook

    def hook(details: Any) -> None:
        global _thread_failure
        name = details.thread.name if details.thread is not None else "unnamed"
        _thread_failure = _thread_failure or f"thread {name}: {_named(details.exc_type, details.exc_value)}"
        previous(details)

    threading.excepthook = hook


def _wrap_os_exit() -> None:
    """Makes `os._exit` end the job: of a rank that is just gone MPICH's launcher kills the others and reports success.

    A replacement of the user's own stays, as a SIGTERM handler does.
    """
    previous: Callable[[int], NoReturn] = os._exit
    if not isinstance(os._exit, BuiltinFunctionType):
        return

    def leave(status: int) -> NoReturn:
        if os.getpid() == _pid and _abort is not None:
            caller = sys._getframe(1)
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            _end_job(f"calls os._exit({status}) in {place}", status & 0xFF or 1)
        previous(status)

    os._exit = leave


def _named(kind: type[BaseException], value: BaseException | None) -> str:
    text = str(value).partition("\n")[0] if value is not None else ""
    return f"{kind.__name__}: {text}" if text else kind.__name__


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _pid:  # a forked child inherited this handler: behave as if there were none
        _default(number)
    else:
        _end_at_once(number)


def _default(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _end_at_once(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    mark_failed(signal.Signals(number).name)
    raise SystemExit(128 + number)
