"""What `mpidl train` refuses: before training, with one sentence, printed once, and status 2 on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import MPIDL, Result, run_ranks

pytestmark = pytest.mark.any_mpi

JOB = """
import torch
from torch.utils.data import TensorDataset
import mpidl

def model():
    return torch.nn.Linear(2, 1)

def loss(model, batch):
    return model(batch[0]).mean()

def data(train):
    return TensorDataset(torch.ones(8, 2))
"""
DIGITS = Path(__file__).parents[2] / "jobs" / "digits.py"


def train(*arguments: str, ranks: int = 2, env: dict[str, str] | None = None) -> Result:
    return run_ranks(ranks, [MPIDL, "train", *arguments], timeout=120, env=env)


def refused(folder: Path, text: str, *arguments: str, ranks: int = 2) -> str:
    """Trains a bad job and returns the line that refuses it."""
    job = folder / "bad.py"
    job.write_text(text)
    result = train(str(job), "--output", str(folder / "out"), *arguments, ranks=ranks)
    assert result.returncode == 2, result.output
    assert not result.timed_out
    assert not (folder / "out").exists()
    lines = [line for line in result.stderr.splitlines() if line.startswith("mpidl: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("def loss(", "def lost(", "has no function loss()"),
        ("model(batch[0]).mean()", "model(batch[0])", "loss(model, batch) of"),
    ],
    ids=["missing", "not-scalar"],
)  # each other mistake: tests/unit/test_cli_job.py
def test_a_bad_job_is_refused_by_name(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert says in refused(tmp_path, JOB.replace(old, new))


def test_what_is_wrong_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    planted = 'def data(train):\n    if mpidl.world().rank == 1:\n        raise RuntimeError("planted on one rank")\n'
    line = refused(tmp_path, JOB.replace("def data(train):\n", planted), ranks=3)
    assert line == "mpidl: rank 1: RuntimeError: planted on one rank"


def test_an_unknown_job_option_is_refused(tmp_path: Path) -> None:
    assert "--lr" in refused(tmp_path, JOB, "--", "--lr", "3")


def test_a_finished_run_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    arguments = [str(job), "--epochs", "1", "--output", str(tmp_path / "out")]
    assert train(*arguments, "--seed", "1").returncode == 0
    before = (tmp_path / "out" / "summary.json").read_text()
    again = train(*arguments, "--seed", "2")
    assert again.returncode == 2, again.output
    assert "holds a finished run" in again.stderr
    assert (tmp_path / "out" / "summary.json").read_text() == before
    assert train(*arguments, "--seed", "2", "--overwrite").returncode == 0
    assert '"seed": 2' in (tmp_path / "out" / "summary.json").read_text()


def test_digits_without_scikit_learn_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise ImportError('hidden for this test')\n")
    output = ["--output", str(tmp_path / "out")]
    result = train(str(DIGITS), *output, ranks=1, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    assert "mpidl: jobs/digits.py needs scikit-learn for its digits: pip install 'mpidl[jobs]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_job_s_own_options_are_listed_once() -> None:
    result = train(str(DIGITS), "--", "--help")
    assert result.returncode == 0, result.output
    assert result.stdout.count("--momentum") == 1
