"""launching.py: a launch is ended by its time limit with nobody left behind, and what it printed is kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launching import PATIENCE, TIMED_OUT, run_ranks, start_ranks

pytestmark = pytest.mark.any_mpi


def test_what_ranks_print_and_return_is_kept() -> None:
    result = run_ranks(3, [sys.executable, "-c", "import sys; print('to stdout'); print('to stderr', file=sys.stderr)"])
    assert (result.returncode, result.timed_out, result.left_over) == (0, False, 0)
    assert result.stdout.count("to stdout") == 3
    assert result.stderr.count("to stderr") == 3


def test_a_failing_rank_fails_the_launch(tmp_path: Path) -> None:
    result = run_ranks(2, [sys.executable, "-c", "raise SystemExit(3)"], cwd=tmp_path)
    assert result.returncode == 3


def test_the_time_limit_ends_ranks_that_ignore_polite_requests() -> None:
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    program = f"{ignores}; print('here', flush=True); time.sleep(99)"
    running = start_ranks(2, [sys.executable, "-c", program])
    result = running.wait(8 / PATIENCE)
    assert (result.returncode, result.timed_out) == (TIMED_OUT, True)
    assert result.stdout.count("here") == 2
    assert running.processes() == []


def test_the_developers_thread_count_does_not_reach_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    program = [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['ADDED'])"]
    assert run_ranks(1, program, env={"ADDED": "yes"}).stdout.split() == ["None", "yes"]
