"""`mpidl train` as a user starts it: the outputs of all three algorithms are there and true."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import MPIDL, WHOLE_TORCH, Result, run_ranks
from safetensors.torch import load_file

from mpidl.training import job as jobs
from mpidl.training import plotting

DIGITS = Path(__file__).parents[2] / "jobs" / "digits.py"

# Nothing learns here (lr 0): every figure of a run can be computed without MPI.
PROBE = """
import sys
import torch
from torch.utils.data import TensorDataset
import mpidl

def model():
    return torch.nn.Linear(3, 1)

def loss(model, batch):
    print(f"SEED {mpidl.world().rank} {torch.initial_seed()}", file=sys.stderr)
    return batch[0].mean() + 0 * model.weight.sum()

def accuracy(model, batch):
    return (batch[0] < 3).float().mean()

def data(train):
    return TensorDataset(torch.arange(13.0) if train else torch.arange(11.0))

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.0)
"""


@dataclass(frozen=True)
class Run:
    """A finished run of the digits job."""

    algorithm: str
    ranks: int
    epochs: int
    result: Result
    output: Path

    @property
    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
        return content

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / name).read_text().splitlines()]

    @property
    def steps(self) -> int:
        """Of each rank: 1,437 training samples, shares padded to the same size, batches of 16."""
        return self.epochs * math.ceil(math.ceil(1437 / self.ranks) / 16)


def train(ranks: int, *arguments: str, env: dict[str, str] | None = None) -> Result:
    return run_ranks(ranks, [MPIDL, "train", *arguments], timeout=240, env=env)


# All three at the length in which the accuracy must be reached; more ranks than cores for the one that stays stable.
CASES = [
    ("synchronous", 2, 20),
    ("agn", 4, 20),
    ("downpour", 2, 20),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    algorithm, ranks, epochs = request.param
    output = tmp_path_factory.mktemp("runs") / "digits"
    arguments = ["--algorithm", algorithm, "--epochs", str(epochs), "--output", str(output)]
    result = train(ranks, str(DIGITS), *arguments, env=WHOLE_TORCH if algorithm == "synchronous" else None)
    assert result.returncode == 0, result.output
    return Run(algorithm, ranks, epochs, result, output)


def test_it_can_be_drawn(run: Run, tmp_path: Path) -> None:
    """With itself as it was half-way: no summary yet, a line only begun."""
    under_way, picture = tmp_path / "under-way", tmp_path / "runs.png"
    under_way.mkdir()
    for file in run.output.glob("metrics*.jsonl"):
        text = file.read_text()
        (under_way / file.name).write_text(text[: len(text) // 2])
    command = [str(MPIDL), "plot", str(run.output), str(under_way), "--output", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"mpidl plot: 2 run(s) drawn into {picture}\n"), done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    read = plotting.read(run.output)
    assert read.records[-1]["samples"] == run.summary["samples"]
    assert read.name == f"{run.output.name} ({run.algorithm}, {run.ranks} ranks)"
    assert plotting.read(under_way).name == "under-way (not finished)"


def held_out(job: jobs.Job, state: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Loss and accuracy of a saved model over all held-out samples at once."""
    model = job.new_model()
    model.load_state_dict(state)
    dataset = job.dataset(False)
    batch = list(dataset[:])  # type: ignore[index]
    with torch.no_grad():
        return float(job.loss(model, batch)), float(job.accuracy(model, batch)) if job.accuracy else math.nan


def test_the_summary_s_figures_are_those_of_the_checkpoint(run: Run) -> None:
    checkpoint = run.output / run.summary["checkpoint"]
    loss, accuracy = held_out(jobs.load(DIGITS), load_file(checkpoint / "model.safetensors"))
    assert run.summary["held_out_loss"] == pytest.approx(loss, rel=1e-4)
    assert run.summary["held_out_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert run.summary["held_out_samples"] == 360
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["position"]["epoch"], manifest["run"]["algorithm"]) == (run.epochs, run.algorithm)
    assert manifest["clock"] == run.summary.get("commits")


def test_digits_are_learnt(run: Run) -> None:
    assert run.summary["held_out_accuracy"] >= (0.95 if run.epochs == 20 else 0.2)


def test_the_summary_says_what_ran(run: Run) -> None:
    summary = run.summary
    assert (summary["algorithm"], summary["ranks"], summary["nodes"]) == (run.algorithm, run.ranks, 1)
    assert (summary["stopped"], summary["epochs_finished"]) == (False, run.epochs)
    assert summary["mpi"]["library"] in ("MPICH", "Open MPI")
    assert summary["versions"]["torch"] == torch.__version__
    assert str(DIGITS) in summary["command"]
    assert summary["options"] == {"lr": 0.07, "momentum": 0.5, "channels": 16}
    assert summary["bytes"] > 0
    assert summary["steps"] == run.steps
    assert summary["samples"] == run.epochs * run.ranks * math.ceil(1437 / run.ranks)
    assert summary["samples_per_second"] == pytest.approx(summary["samples"] / summary["wall_seconds"])


def test_metrics_add_up(run: Run) -> None:
    synchronous = run.algorithm == "synchronous"
    names = ["metrics.jsonl"] if synchronous else [f"metrics.{rank}.jsonl" for rank in range(run.ranks)]
    expected = sorted([*names, "checkpoints", "summary.json"])
    assert sorted(entry.name for entry in run.output.iterdir()) == expected
    records = [run.metrics(name) for name in names]
    assert sum(record["samples"] for lines in records for record in lines) == run.summary["samples"]
    for rank, lines in enumerate(records):
        assert lines[-1]["epoch"] == run.epochs
        assert lines[-1]["step"] == run.steps
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert all(early["seconds"] < late["seconds"] for early, late in itertools.pairwise(lines))
        assert all(0 <= record["seconds_communicating"] <= record["seconds"] for record in lines)
        assert synchronous or {record["rank"] for record in lines} == {rank}


def test_staleness_counts_every_commit(run: Run) -> None:
    if run.algorithm == "synchronous":
        assert "staleness" not in run.summary
        return
    histogram = {int(tau): n for tau, n in run.summary["staleness"].items()}
    commits = run.ranks * math.ceil(run.steps / 3)
    assert run.summary["commits"] == sum(histogram.values()) == commits
    mean = sum(tau * n for tau, n in histogram.items()) / commits
    assert run.summary["mean_staleness"] == pytest.approx(mean)
    assert 0 < mean < commits
    every = sorted(tau for tau, n in histogram.items() for _ in range(n))
    p50, p95 = (every[math.ceil(share * commits) - 1] for share in (0.5, 0.95))
    found = [run.summary[f"staleness_{name}"] for name in ("p50", "p95", "max")]
    assert found == [p50, p95, every[-1]]
    assert f"mean {mean:.2f}, p50 {p50}, p95 {p95}, max {every[-1]}\n" in run.result.stderr


def test_progress_is_plain_lines_in_a_log(run: Run) -> None:
    ends = [line for line in run.result.stderr.splitlines() if line.startswith(f"digits {run.algorithm} x{run.ranks}:")]
    assert len(ends) >= run.epochs
    assert f"epoch {run.epochs}/{run.epochs}" in ends[-1]
    assert ("staleness" in ends[-1]) == (run.algorithm != "synchronous")
    assert "\x1b" not in run.result.stderr


@pytest.mark.any_mpi
def test_figures_are_means_over_the_samples_of_all_ranks(tmp_path: Path) -> None:
    job = tmp_path / "probe.py"
    job.write_text(PROBE)
    output = tmp_path / "out"
    options = ["--epochs", "2", "--batch-size", "2", "--seed", "7", "--log-every", "1", "--output", str(output)]
    result = train(3, str(job), *options)
    assert result.returncode == 0, result.output

    summary = json.loads((output / "summary.json").read_text())
    assert summary["held_out_loss"] == pytest.approx(5)  # the mean of 0..10, each once: 4 + 4 + 3 samples
    assert summary["held_out_accuracy"] == pytest.approx(3 / 11)
    assert summary["held_out_samples"] == 11

    torch.manual_seed(7)
    initial = torch.nn.Linear(3, 1)
    saved = load_file(output / summary["checkpoint"] / "model.safetensors")
    assert torch.equal(saved["weight"], initial.weight)
    seeds = {tuple(line.split()[1:]) for line in result.stderr.splitlines() if line.startswith("SEED")}
    assert {("0", "7"), ("1", "8"), ("2", "9")} <= seeds

    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    expected = expected_losses(seed=7, ranks=3, epochs=2)
    assert [record["samples"] for record in records] == [6, 6, 3] * 2  # 5 samples a rank, in batches of 2
    assert [record["loss"] for record in records] == pytest.approx(expected)


@pytest.mark.any_mpi
def test_hyperparameters_and_the_clock_spread_reach_the_algorithm(tmp_path: Path) -> None:
    """Elastic averaging with a job that learns nothing; an overlong alpha is refused by the class, printed once."""
    job, output = tmp_path / "probe.py", tmp_path / "out"
    job.write_text(PROBE)
    common = [str(job), "--algorithm", "aeasgd", "--epochs", "2", "--batch-size", "1", "--output", str(output)]
    result = train(2, *common, "--set", "beta=0.5", "--communication-window", "2", "--max-clock-spread", "1")
    assert result.returncode == 0, result.output
    summary = json.loads((output / "summary.json").read_text())
    assert summary["hyperparameters"] == {"beta": 0.5}
    assert (summary["communication_window"], summary["max_clock_spread"], summary["commits"]) == (2, 1, 14)
    assert all("seconds_waiting" in json.loads(x) for x in (output / "metrics.1.jsonl").read_text().splitlines())
    result = train(2, *common, "--overwrite", "--set", "beta=99")
    assert result.returncode == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("mpidl: ")]
    assert lines == [
        "mpidl: --algorithm aeasgd: alpha = beta / 2 worker(s) = 49.5; expected at most 1, where worker and center swap"
    ]


def expected_losses(seed: int, ranks: int, epochs: int) -> list[float]:
    """The mean of the samples 0..12 that the ranks see together in each step of batches of 2."""
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(13, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        padded = order + order[: -13 % ranks]
        for start in range(0, 5, 2):
            seen = [padded[i] for rank in range(ranks) for i in range(rank, len(padded), ranks)[start : start + 2]]
            losses.append(sum(seen) / len(seen))
    return losses


@pytest.mark.any_mpi
def test_a_job_runs_as_a_program_of_its_own(tmp_path: Path) -> None:
    program = [sys.executable, str(DIGITS), "--epochs", "1", "--output", str(tmp_path / "x"), "--", "--lr", "0.01"]
    result = run_ranks(2, program, timeout=120)
    assert result.returncode == 0, result.output
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["options"]["lr"] == 0.01
