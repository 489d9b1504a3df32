"""Keeps one started job: turns Ctrl-C into a request to stop, ends the job when asked, leaves no rank behind.

It knows processes and signals only; mpirun passes SIGUSR1 on to the ranks (tried with Open MPI 5 and MPICH 5, and
documented for srun).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 5.0  # between asking the job to end and killing what is left of it
_POLL_SECONDS = 0.05


def supervise(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start `argv` in a process group of its own, wait for it, and return its exit status (128 + n for signal n).

    A terminal's Ctrl-C reaches only this process: the first becomes SIGUSR1 to the job, the second ends it; SIGTERM
    and SIGHUP end it at once.
    """
    # A background process group that reads the terminal is stopped by the kernel (SIGTTIN); a pipe or file is kept.
    stdin = subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
    # Until the job exists a signal is only kept, so that none can leave a started job without its supervisor.
    requests = Requests()
    with requests.taken():
        job = subprocess.Popen(argv, env=dict(environment), stdin=stdin, start_new_session=True)
        return _status(_wait(job, requests))


class Requests:
    """Counts what the user asked for; signal handlers only count, the waiting loop acts."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.endings = 0

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupts += 1

    def _ended(self, _number: int, _frame: FrameType | None) -> None:
        self.endings += 1

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP for the time of the job."""
        handlers = {signal.SIGINT: self._interrupted, signal.SIGTERM: self._ended, signal.SIGHUP: self._ended}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(job: subprocess.Popen[bytes], requests: Requests) -> int:
    asked_to_stop = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return job.wait(timeout=_POLL_SECONDS)
        if requests.endings or requests.interrupts > 1:
            print("mpidl run: ending the job", file=sys.stderr, flush=True)
            return end(job)
        if requests.interrupts and not asked_to_stop:
            asked_to_stop = True
            print("mpidl run: asked the ranks to stop after their step (Ctrl-C again ends them now)", file=sys.stderr)
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGUSR1)


def end(job: subprocess.Popen[bytes], grace: float = GRACE_SECONDS) -> int:
    """Terminate the job, and after `grace` seconds kill what is left of it; returns the launcher's status."""
    members = [job.pid, *descendants(job.pid)]
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGTERM)
    limit = time.monotonic() + grace
    while time.monotonic() < limit and (job.poll() is None or any(map(_alive, members[1:]))):
        time.sleep(_POLL_SECONDS)
    # Ranks that ignored SIGTERM outlive their launcher; they were listed while it still was their ancestor.
    for pid in {*members, *descendants(job.pid)} if job.poll() is None else set(members[1:]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    status = job.wait()
    return status if status != 0 else -signal.SIGTERM


def descendants(pid: int) -> list[int]:
    """Every process that stems from `pid`, as /proc shows it now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, ...; None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def _alive(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[0] not in "ZX"


def _status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
