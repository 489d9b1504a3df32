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
    assert "3 kept, 0 broken" in done.stdout


def test_every_module_stands_on_a_floor() -> None:
    contract = (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "mpidl").iterdir():
        if path.name in ("__init__.py", "__main__.py", "__pycache__") or path.suffix not in (".py", ""):
            continue
        layers = contract.partition("layers = [")[2].partition("]")[0]
        assert f"mpidl.{path.stem}" in layers.replace('"', " ").replace("|", " ").replace(",", " ").split(), path.name


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("layout.py", "from mpidl import communicator", "The floors"),
        ("waiting.py", "from mpidl import topology", "The floors"),
        ("operations.py", "from mpi4py import MPI", "mpi4py on floors"),
        ("parameter_server/clock.py", "import mpi4py", "mpi4py on floors"),
        ("communicator.py", "import torch", "torch by an import statement"),
    ],
)
def test_a_planted_violation_is_found(copy: Path, file: str, line: str, broken: str) -> None:
    path = copy / "mpidl" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    done = lint(copy)
    assert done.returncode != 0, done.stdout
    assert any(broken in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout
