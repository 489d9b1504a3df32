"""How training ends before its time: when asked, with checkpoint and summary; when killed, with the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import MPIDL, Running, start_ranks

DIGITS = Path(__file__).parents[2] / "jobs" / "digits.py"
STOPPED = 75


def start(output: Path, algorithm: str, ranks: int) -> Running:
    arguments = [str(DIGITS), "--algorithm", algorithm, "--epochs", "100000", "--output", str(output)]
    return start_ranks(ranks, [MPIDL, "train", *arguments])


def until(running: Running, there: Callable[[], bool]) -> None:
    while not there():
        assert running.process.poll() is None, running.printed()
        assert running.seconds < 120, running.printed()
        time.sleep(0.05)


def ranks_of(running: Running) -> list[int]:
    """The processes that train, not their launchers."""
    found = []
    for pid in running.processes():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if os.fsdecode(command[0]) == sys.executable and b"train" in command:
            found.append(pid)
    return found


def test_a_signal_to_the_launcher_stops_all_ranks(tmp_path: Path) -> None:
    running = start(tmp_path / "out", "synchronous", 2)
    until(running, (tmp_path / "out" / "checkpoint.pt").exists)
    running.process.send_signal(signal.SIGUSR1)
    asked = running.seconds
    result = running.wait(60)
    assert result.returncode == STOPPED, result.output
    assert result.seconds - asked < 20
    check_stopped(tmp_path / "out")


@pytest.mark.parametrize("algorithm", ["synchronous", "agn"])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, algorithm: str) -> None:
    running = start(tmp_path / "out", algorithm, 3)
    until(running, (tmp_path / "out" / "checkpoint.pt").exists)
    members = ranks_of(running)
    assert len(members) == 3
    os.kill(members[1], signal.SIGUSR1)
    result = running.wait(60)
    assert result.returncode == STOPPED, result.output
    check_stopped(tmp_path / "out")


def check_stopped(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert summary["stopped"] is True
    assert summary["epochs_finished"] < summary["epochs"]
    assert summary["held_out_accuracy"] is not None
    checkpoint = torch.load(output / "checkpoint.pt", weights_only=True)
    assert checkpoint["epochs"] == summary["epochs_finished"]


def test_killed_ranks_leave_a_whole_checkpoint_and_no_summary(tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = start(output, "agn", 2)
    until(running, (output / "checkpoint.pt").exists)
    time.sleep(1)  # many replacements of the checkpoint later
    killed = running.seconds
    for pid in ranks_of(running):
        os.kill(pid, signal.SIGKILL)
    result = running.wait(60)
    assert result.returncode != 0
    assert result.seconds - killed < 10
    assert result.left_over == 0
    assert not (output / "summary.json").exists()
    assert torch.load(output / "checkpoint.pt", weights_only=True)["epochs"] >= 1


def test_sigterm_to_one_rank_ends_the_job(tmp_path: Path) -> None:
    running = start(tmp_path / "out", "downpour", 2)
    until(running, (tmp_path / "out" / "checkpoint.pt").exists)
    ended = running.seconds
    os.kill(ranks_of(running)[0], signal.SIGTERM)
    result = running.wait(60)
    assert result.returncode not in (0, STOPPED)
    assert result.seconds - ended < 10
    assert result.left_over == 0
