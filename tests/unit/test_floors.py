"""Imports point down only: import-linter's contracts in pyproject.toml hold, and planted violations break them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("importlinter", reason="import-linter is not installed: pip install import-linter")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", program, "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "mpidl", tmp_path / "mpidl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_floors_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("arrays/layout.py", "from mpidl.collectives import communicator", "The floors"),
        ("parameter_server/downpour.py", "from mpidl.synchronous import synchronous", "The floors"),
        ("trace.py", "import os", "The floors"),
        ("mpi/waiting.py", "from mpidl.mpi import topology", "No cycle"),
        ("synchronous/reduction/round.py", "from mpidl.synchronous import synchronous", "No cycle"),
        ("collectives/operations.py", "from mpi4py import MPI", "mpi4py in mpidl.mpi only"),
        ("parameter_server/center/clock.py", "import mpi4py", "mpi4py in mpidl.mpi only"),
        ("collectives/communicator.py", "import torch", "torch from mpidl.optim up only"),
    ],
)
def test_a_planted_violation_is_found(copy: Path, file: str, line: str, broken: str) -> None:
    path = copy / "mpidl" / file
    before = path.read_text() if path.exists() else ""  # a new file must be given its floor too
    path.write_text(f"{before}\n{line}\n")
    done = lint(copy)
    assert done.returncode != 0, done.stdout
    assert any(broken in text for text in done.stdout.splitlines()), done.stdout
