"""`mpidl run` with real ranks: its line, its status, Ctrl-C once and twice, SIGTERM; nobody is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import MPIDL, PATIENCE, Running, environment_for_tests

TINY = Path(__file__).with_name("tiny_job.py")

RANK = """
import os, sys, time
from mpi4py import MPI
world = MPI.COMM_WORLD
print(f"rank {world.rank} of {world.size}", flush=True)
world.Barrier()
"""


def mpidl_run(ranks: int, *program: str) -> Running:
    command = [MPIDL, "run", "-n", str(ranks), "--", *program]
    return Running(command, environment_for_tests(), None)


@pytest.fixture
def sleeping() -> Iterator[Running]:
    """Two ranks that would sleep for a minute, and are there."""
    running = mpidl_run(2, "python", "-c", RANK + "time.sleep(60)")
    while running.printed().count("rank") < 2:
        assert running.seconds < 60 * PATIENCE, running.printed()
        time.sleep(0.05)
    yield running
    running.kill()


def test_it_says_what_it_runs_starts_n_ranks_and_ends_with_their_status() -> None:
    result = mpidl_run(3, "python", "-c", RANK + "sys.exit(5)").wait(60)
    assert result.returncode == 5, result.output
    assert sorted(re.findall(r"rank (\d) of 3", result.stdout)) == ["0", "1", "2"]
    said = [line for line in result.stderr.splitlines() if line.startswith("mpidl run: ")]
    assert len(said) == 1
    assert "mpirun -n 3 python -c" in said[0]


def test_python_in_a_program_is_this_environment_s() -> None:
    result = mpidl_run(1, "python", "-c", "import sys; print(sys.prefix)").wait(60)
    assert result.stdout.strip() == sys.prefix


def test_inside_a_rank_it_refuses() -> None:
    result = mpidl_run(1, MPIDL, "run", "-n", "2", "--", "true").wait(60)
    assert result.returncode == 2, result.output
    assert "was itself started as a rank" in result.stderr


def test_sigterm_ends_the_job(sleeping: Running) -> None:
    sleeping.process.send_signal(signal.SIGTERM)
    began = sleeping.seconds
    result = sleeping.wait(60)
    assert result.returncode not in (0, None)
    assert result.seconds - began < 10
    assert result.left_over == 0


def test_ctrl_c_twice_ends_the_job(sleeping: Running) -> None:
    sleeping.process.send_signal(signal.SIGINT)  # these ranks know no SIGUSR1 and may end by it already
    time.sleep(0.3)
    if sleeping.process.poll() is None:
        sleeping.process.send_signal(signal.SIGINT)
    began = sleeping.seconds
    result = sleeping.wait(60)
    assert result.returncode not in (0, None)
    assert result.seconds - began < 10
    assert result.left_over == 0


def test_on_a_terminal_a_bar_is_drawn_through_the_launcher_s_pipes(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    arguments = ["--epochs", "1", "--batch-size", "4", "--output", str(tmp_path / "out")]
    program = ["mpidl", "train", str(TINY), *arguments]
    command = [MPIDL, "run", "-n", "2", "--", *program]
    process = subprocess.Popen(command, env=environment_for_tests(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    assert process.wait(timeout=120) == 0, shown.decode()
    assert b"\x1b[" in shown
    assert "━" in shown.decode()
    assert b"8/8" in shown
    assert b"samples/s" in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # every process that held the terminal has ended
        return b""


def test_ctrl_c_once_lets_training_end_with_its_outputs(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--epochs", "100000", "--algorithm", "downpour", "--output", str(output)]
    running = mpidl_run(2, "mpidl", "train", str(TINY), *arguments)
    while not list(output.glob("checkpoints/0*")):
        assert running.process.poll() is None, running.printed()
        assert running.seconds < 120 * PATIENCE, running.printed()
        time.sleep(0.05)
    os.kill(running.process.pid, signal.SIGINT)
    result = running.wait(60)
    assert result.returncode == 75, result.output
    assert json.loads((output / "summary.json").read_text())["stopped"] is True
