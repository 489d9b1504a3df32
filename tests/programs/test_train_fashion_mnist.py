"""jobs/fashion_mnist.py under `mpidl train`: a made data set is learnt; Debian's, where installed, begins to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_fashion_mnist as made
import pytest
from launching import MPIDL, run_ranks

pytestmark = pytest.mark.any_mpi

JOB = Path(__file__).parents[2] / "jobs" / "fashion_mnist.py"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def train(output: Path, *arguments: str) -> dict[str, Any]:
    command = [MPIDL, "train", str(JOB), "--output", str(output), *arguments]
    done = run_ranks(2, command, timeout=240)
    assert done.returncode == 0, done.output
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def test_a_made_data_set_is_learnt_in_an_epoch(tmp_path: Path) -> None:
    made.write(tmp_path, {"train": 800, "t10k": 100})
    summary = train(tmp_path / "out", "--epochs", "1", "--batch-size", "8", "--", "--data", str(tmp_path))
    assert summary["held_out_samples"] == 100
    assert summary["held_out_accuracy"] >= 0.9


def test_debian_s_data_set_begins_to_be_learnt(tmp_path: Path) -> None:
    if not DEBIAN.is_dir():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    summary = train(tmp_path / "out", "--epochs", "1", "--batch-size", "16", "--", "--limit", "3000")
    assert (summary["samples"], summary["held_out_samples"]) == (3000, 3000)
    assert summary["held_out_accuracy"] >= 0.6  # a guess is right in 0.1
