"""Jobs that are stopped before their end: pre-empted, signalled, cancelled, on two nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from slurm_cluster import Cluster, Ended

from mpidl.training.checkpoint import Store, decode
from mpidl.training.saving import MODEL, TRAINING, local_name

pytestmark = pytest.mark.slurm
RANKS = 2
HELD_JOB = str(Path(__file__).with_name("held_job.py"))
OPTIONS = [HELD_JOB, "--epochs", "5", "--batch-size", "8"]  # 4 steps an epoch; the ranks are held in the third
ONE_PER_NODE = "--ntasks-per-node=1"


def outputs(cluster: Cluster, job: int) -> Path:
    (folder,) = (cluster.folder / "runs").glob(f"*-{job}")
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


class Held:
    """A job whose ranks wait in a step until `go`; `ranks` of them do when the constructor returns."""

    def __init__(self, cluster: Cluster, name: str, *arguments: str, ranks: int = RANKS) -> None:
        self._cluster, self._folder = cluster, cluster.folder / name
        self._folder.mkdir()
        self.job = cluster.submit(ONE_PER_NODE, *arguments, *OPTIONS, env={"MPIDL_TEST_HELD": str(self._folder)})
        cluster.until(lambda: len(list(self._folder.glob("held.*"))) >= ranks, self.job, "its ranks being held")

    def until_asked(self) -> None:
        self._cluster.until(lambda: len(list(self._folder.glob("asked.*"))) == RANKS, self.job, "a request to stop")

    def go(self) -> None:
        (self._folder / "go").touch()

    def stop_and_go(self, *scancel: str) -> None:
        assert self._cluster.run(["scancel", *scancel, str(self.job)]).returncode == 0
        self.go()

    def wait(self) -> Ended:
        return self._cluster.wait(self.job)


def test_a_preempted_job_ends_bit_for_bit_as_an_undisturbed_one(cluster: Cluster) -> None:
    held = Held(cluster, "preempted", "jobs/synchronous.sbatch")
    urgent = cluster.submit("--partition=urgent", "--exclusive", "--nodes=2", "--wrap=true")
    cluster.until(lambda: cluster.show(held.job)["PreemptTime"] != "None", held.job, "being pre-empted")
    held.go()
    preempted = held.wait()
    assert (preempted.state, preempted.restarts) == ("COMPLETED", 1), preempted.output
    assert cluster.wait(urgent).state == "COMPLETED"
    undisturbed = cluster.wait(cluster.submit(ONE_PER_NODE, "jobs/synchronous.sbatch", *OPTIONS))
    assert (undisturbed.state, undisturbed.restarts) == ("COMPLETED", 0), undisturbed.output
    folders = [outputs(cluster, ended.job) for ended in (preempted, undisturbed)]
    first, second = map(summary, folders)
    assert (first["resumed"], second["resumed"]) == (1, 0)
    assert first["steps"] == second["steps"] == 20
    assert first["nodes"] == second["nodes"] == 2
    same(*map(content, folders))


def test_a_job_is_asked_before_its_time_limit_and_goes_on_after_it(cluster: Cluster) -> None:
    """By the script's own --signal, two minutes before the limit or, as SLURM counts, up to half a minute earlier."""
    held = Held(cluster, "limited", "--time=3", "jobs/synchronous.sbatch")
    held.until_asked()
    held.go()
    ended = held.wait()
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.output
    final = summary(outputs(cluster, ended.job))
    assert (final["stopped"], final["resumed"], final["epochs_finished"], final["steps"]) == (False, 1, 5, 20)


def content(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds that training goes on from: model, optimiser, each rank's random numbers."""
    checkpoint = Store(folder / "checkpoints").newest(pytest.fail)
    assert checkpoint is not None
    locals_ = [decode(checkpoint.read(local_name(rank))) for rank in range(RANKS)]
    kept = [{name: local[name] for name in ("random", "buffers")} for local in locals_]
    return {"model": checkpoint.read(MODEL), "training": decode(checkpoint.read(TRAINING)), "ranks": kept}


def same(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Fails unless both are equal, bit for bit, down to the last tensor."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)), where
    elif isinstance(a, Mapping):
        assert list(a) == list(b), where
        for name in a:
            same(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, Sequence) and not isinstance(a, (str, bytes)):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{where}[{i}]")
    else:
        assert a == b, where


def test_a_job_that_may_not_be_requeued_says_how_it_goes_on(cluster: Cluster) -> None:
    # One rank that is held holds the others too, when they come to its shard: MPI over TCP needs its help.
    held = Held(cluster, "not-requeued", "--no-requeue", "jobs/parameter_server.sbatch", ranks=1)
    held.stop_and_go("--signal=USR1")
    ended = held.wait()
    assert (ended.state, ended.status, ended.restarts) == ("FAILED", 75, 0), ended.output
    output = f"runs/mpidl-parameter-server-{held.job}"
    assert f"--output {output}" in ended.output.splitlines()[-1]
    assert summary(cluster.folder / output)["stopped"] is True
    script = "jobs/parameter_server.sbatch"
    again = cluster.wait(cluster.submit(ONE_PER_NODE, script, *OPTIONS, "--output", output))
    assert (again.state, again.status) == ("COMPLETED", 0), again.output
    final = summary(cluster.folder / output)
    assert (final["stopped"], final["resumed"], final["epochs_finished"]) == (False, 1, 5)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    held = Held(cluster, "cancelled", "jobs/synchronous.sbatch")
    held.stop_and_go()
    cluster.until(
        lambda: not cluster.run(["squeue", "--noheader", "--jobs", str(held.job)]).stdout.strip(), held.job, "its end"
    )
    told = cluster.show(held.job)
    assert (told["JobState"], told["Restarts"]) == ("CANCELLED", "0"), cluster.output(told)
