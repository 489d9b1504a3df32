"""Files of tests/mpi on two nodes, in the ranks srun starts: the server, its family, collectives; how they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bed import FOLDER
from bed import RANKS as RANKS_VARIABLE
from slurm_cluster import ROOT, TIME_LIMIT, Cluster

from mpidl.cli.launch.launcher import slurm_plugin

pytestmark = pytest.mark.slurm
RANKS = 4
SRUN = ["srun", f"--mpi={slurm_plugin()}", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1"]
COUNTING = [
    "test_committed_integers_add_up_exactly_a_thousand_times",
    "test_commit_numbers_and_clocks_while_all_run_free",
    "test_staleness_with_a_token_is_exactly_n_minus_1",
    "test_staleness_of_free_runners_is_recorded",
]


# Two and four ranks: one rank is on one node, and nodes of two ranks and of one the suite has shown, as pretended ones.
SEVERAL = ["-k", "not size1 and not size3"]


def test_counting_and_staleness_are_exact_across_nodes(cluster: Cluster) -> None:
    selected = ["-k", " or ".join(COUNTING)]
    for passed in in_ranks(cluster, "server", ["test_server.py"], selected, {"MPIDL_TESTS_ROUNDS": "20"}):
        assert {name.rpartition("::")[2].partition("[")[0] for name in passed} == set(COUNTING)


def test_histories_replay_and_the_family_across_nodes(cluster: Cluster) -> None:
    files = ["test_history.py", "test_replay.py", "test_family_together.py", "test_overlap.py"]
    some = "free_runners or lose_and_tear or sums_of_squares or dynsgd_scales or follows_a_log and (AGN or AEASGD)"
    some += " or doubled and Downpour"
    for passed in in_ranks(cluster, "family", files, ["-k", some]):
        assert {Path(name.partition("::")[0]).name for name in passed} == set(files)


def test_collectives_and_lanes_across_nodes(cluster: Cluster) -> None:
    files = ["test_lanes.py", "test_collectives.py", "test_every_size.py", "test_mismatch.py"]
    for passed in in_ranks(cluster, "collectives", files, SEVERAL):
        assert {Path(name.partition("::")[0]).name for name in passed} == set(files)


def test_synchronous_across_nodes(cluster: Cluster) -> None:
    files = ["test_synchronous.py", "test_synchronous_kinds.py"]
    for passed in in_ranks(cluster, "synchronous", files, SEVERAL):
        assert {Path(name.partition("::")[0]).name for name in passed} == set(files)


def test_a_rank_that_comes_late_to_the_end_lets_all_leave(cluster: Cluster) -> None:
    late = str(Path(__file__).with_name("late_job.py"))
    done = cluster.run([*SRUN, "timeout", "60", "python", late])
    assert (done.returncode, done.stdout.count("leaves")) == (0, RANKS), done.stdout + done.stderr


def in_ranks(
    cluster: Cluster, name: str, files: list[str], arguments: list[str] | None = None, env: dict[str, str] | None = None
) -> list[list[str]]:
    """Runs files of tests/mpi in four ranks on two nodes; returns the names of the tests that passed, by rank."""
    folder = cluster.folder / name  # a node's own /tmp would not do
    folder.mkdir()
    program = ["python", str(ROOT / "tests" / "rank_main.py"), *(str(ROOT / "tests" / "mpi" / file) for file in files)]
    own = {FOLDER: str(folder), RANKS_VARIABLE: str(RANKS), "MPIDL_TESTS_LIMIT": str(TIME_LIMIT)}
    done = cluster.run([*SRUN, *program, *(arguments or [])], env={**own, **(env or {})})
    assert done.returncode == 0, done.stdout + done.stderr + report(folder)
    found = []
    for rank in range(RANKS):
        lines = [json.loads(line) for line in (folder / f"{rank}.jsonl").read_text().splitlines()]
        assert lines[-1] == {"exit": 0}, report(folder)
        found.append([line["test"] for line in lines if line.get("outcome") == "passed"])
    return found


def report(folder: Path) -> str:
    """What the ranks wrote about failed tests, or last printed."""
    found = sorted(folder.glob("*.failure")) or sorted(folder.glob("*.log"))
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in found)
