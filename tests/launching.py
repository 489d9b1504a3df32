"""Starts programs with mpirun for the tests and ends them whatever happens: `start_ranks`, `run_ranks`, `Result`.

How a test file is run inside ranks stands in bed.py; nothing here knows pytest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mpidl.cli.launch import launcher

MPIDL = str(Path(sys.executable).with_name("mpidl"))  # the command as installed
TIME_LIMIT = 300.0  # seconds one launch may take, unless its caller says otherwise
# A limit is there to end what hangs, not to judge speed: on a machine whose cores are taken by others a launch gets
# this many times as long as its test says.
PATIENCE = 5
WHOLE_TORCH = {"PYTHONPATH": ""}  # as `env`: nothing of torch is put off, see ranks_site/sitecustomize.py
TIMED_OUT = 124  # the return code of a launch that was ended by its time limit, as timeout(1) has it

_MARK = "MPIDL_TESTS_LAUNCH"  # in the environment of every process of a launch; value: one launch's own word
# The developer's choice must not decide what the tests see: threads per rank are mpidl's to choose, and lines that are
# written in pieces mix with other ranks'.
_DROPPED = ("PYTHONUNBUFFERED", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Result:
    """How a launch ended and what it printed."""

    returncode: int  # TIMED_OUT if the time limit ended it
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool = False
    left_over: int = 0  # processes still alive a while after the launcher ended; they have been killed

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


_started: list[Running] = []  # not known to have ended


def kill_all() -> None:
    """Ends what a test has started and, when it failed, left running."""
    while _started:
        _started.pop().kill()


class Running:
    """A started program: signal it, wait for it, kill it. Its output goes to files, so nothing blocks on a pipe."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], cwd: str | Path | None) -> None:
        self._word = uuid.uuid4().hex
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,  # CI has none
            stdout=self._out,
            stderr=self._err,
            env={**environment, _MARK: self._word},
            cwd=cwd or tempfile.gettempdir(),  # never the checkout: its mpidl/ would hide the installed one from -c, -m
            start_new_session=True,
        )
        _started.append(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def printed(self) -> str:
        """What it has printed so far, standard output first."""
        return _read(self._out) + _read(self._err)

    def processes(self) -> list[int]:
        """Every living process of this launch: launcher, proxies, ranks, and what they started."""
        return [pid for pid, word in _marked_processes() if word == self._word]

    def wait(self, timeout: float = TIME_LIMIT) -> Result:
        """Waits for the end, kills everything after `timeout` times PATIENCE, and returns what was printed."""
        timed_out = False
        try:
            self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            timed_out = True
            self.kill()
        seconds = self.seconds
        left_over = 0 if timed_out else self._reap()
        _forget(self)
        code = TIMED_OUT if timed_out else self.process.returncode
        return Result(code, _read(self._out), _read(self._err), seconds, timed_out, left_over)

    def kill(self) -> None:
        """Ends the launcher politely, so that it cleans up after itself, and then all that is left."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._reap()
        _forget(self)

    def _reap(self) -> int:
        """Kills what outlived the launcher (ranks may have sessions of their own); returns how many there were."""
        until = time.monotonic() + 2 * PATIENCE
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(left)


def _forget(running: Running) -> None:
    if running in _started:
        _started.remove(running)


def start_ranks(
    ranks: int,
    program: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Running:
    """Starts `ranks` ranks of `program` as `mpidl run` would; `env` is added to the tests' environment."""
    environment = environment_for_tests(env)
    launch = launcher.plan(ranks, program, environ=environment)
    return Running(launch.argv, {**environment, **launch.environment}, cwd)


def run_ranks(
    ranks: int,
    program: Sequence[str],
    *,
    timeout: float = TIME_LIMIT,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Result:
    """Runs `ranks` ranks of `program` to the end, `timeout` seconds times PATIENCE at most."""
    running = start_ranks(ranks, program, env=env, cwd=cwd)
    try:
        return running.wait(timeout)
    except BaseException:  # Ctrl-C in the tests must not leave ranks behind
        running.kill()
        raise


def environment_for_tests(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """The tests' environment without the developer's thread counts, with what ranks need to start fast and `added`."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    paths = [str(Path(__file__).with_name("ranks_site")), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **(added or {})}


def alive(pid: int) -> bool:
    """Whether process `pid` exists and is not merely waiting to be buried by its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _marked_processes() -> Iterator[tuple[int, str]]:
    needle = f"{_MARK}=".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        for variable in variables:
            if variable.startswith(needle):
                yield int(entry.name), variable[len(needle) :].decode()


def _read(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
