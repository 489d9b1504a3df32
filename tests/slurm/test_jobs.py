"""The job scripts of jobs/, submitted for real on two nodes, with the MPI of this environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Ended

from mpidl.cli.launch.launcher import slurm_plugin

pytestmark = pytest.mark.slurm
PLUGIN = slurm_plugin()
LIBRARY = {"pmi2": "MPICH", "pmix": "Open MPI"}[PLUGIN]


def lines(output: str) -> dict[str, str]:
    """The doctor's report: subject -> its whole line."""
    found = [line for line in output.splitlines() if line.startswith(("ok ", "WARN ", "FAIL "))]
    by_subject = {line[6:].partition(":")[0]: line for line in found}
    assert len(by_subject) == len(found), output
    return by_subject


def test_check(cluster: Cluster) -> None:
    ended = cluster.wait(cluster.submit("jobs/check.sbatch"))
    report = lines(ended.output)
    assert (ended.state, ended.status) == ("COMPLETED", 0), ended.output
    assert not [line for line in report.values() if line.startswith("FAIL")]
    assert report["launcher"] == f"ok    launcher: srun --mpi={PLUGIN}, 4 ranks"
    assert report["ranks per node"] == "ok    ranks per node: 2 x 2 (nodes x ranks)"
    assert "right" in report["one-sided MPI"]
    assert "right" in report["one-sided between nodes"]
    assert "GB/s" in report["speed in a node"]
    assert "GB/s" in report["speed between nodes"]


def test_ranks_that_do_not_find_each_other_are_named_once_with_the_remedy(cluster: Cluster) -> None:
    ended = cluster.wait(cluster.submit("jobs/check.sbatch", env={"SLURM_MPI_TYPE": "none"}))
    assert (ended.state, ended.status) == ("FAILED", 1), ended.output
    report = lines(ended.output)
    assert report["launcher"].startswith(f"FAIL  launcher: srun --mpi=none started 4 ranks and {LIBRARY} sees 1: ")
    assert f"start with srun --mpi={PLUGIN}" in report["launcher"]


def test_synchronous(cluster: Cluster) -> None:
    summary, ended = train(cluster, "jobs/synchronous.sbatch", "--epochs", "6", "--", "--lr", "0.15", "--channels", "8")
    assert summary["algorithm"] == "synchronous"
    assert summary["held_out_accuracy"] >= 0.85, ended.output


@pytest.mark.parametrize("servers", [0, 1])
def test_parameter_server(cluster: Cluster, servers: int) -> None:
    # Downpour adds up what AGN takes the mean of, so its steps are to be smaller.
    lr, chosen = ("0.04", {"SERVERS": "1", "ALGORITHM": "downpour"}) if servers else ("0.15", {})
    more = ("--epochs", "6", "--communication-window", "5", "--", "--lr", lr, "--channels", "8")
    summary, ended = train(cluster, "jobs/parameter_server.sbatch", *more, env=chosen)
    assert (summary["algorithm"], summary["servers"]) == (chosen.get("ALGORITHM", "agn"), servers)
    assert summary["held_out_accuracy"] >= 0.7, ended.output
    assert summary["mean_staleness"] > 0


def train(cluster: Cluster, script: str, *more: str, env: dict[str, str] | None = None) -> tuple[dict[str, Any], Ended]:
    """Submits a training of a few epochs; returns its summary."""
    ended = cluster.wait(cluster.submit(script, "jobs/digits.py", *more, env=env))
    assert (ended.state, ended.status) == ("COMPLETED", 0), ended.output
    (folder,) = (cluster.folder / "runs").glob(f"*-{ended.job}")
    summary = json.loads(Path(folder / "summary.json").read_text())
    assert (summary["ranks"], summary["nodes"], summary["epochs_finished"]) == (4 - int(summary["servers"]), 2, 6)
    assert summary["mpi"]["library"] == LIBRARY
    return summary, ended
