"""What the doctor reads from a rank's environment: who started it, and whether that fits SLURM's allocation."""

from __future__ import annotations

import pytest

from mpidl.cli.doctor.launch_checks import Started, against_allocation, foreseen, started, tasks_per_node

# As found in ranks; of each launcher only what tells it from the others.
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
DAEMON = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}  # by which mpirun starts its helpers


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (ALLOCATION, None),  # the batch script itself
        (OPEN_MPI, Started("Open MPI's mpirun", 4, 1)),
        (MPICH, Started("a PMI launcher (MPICH's mpirun)", 4, 1)),
        (OPEN_MPI | ALLOCATION | DAEMON, Started("Open MPI's mpirun", 4, 1)),
        (MPICH | ALLOCATION | DAEMON, Started("a PMI launcher (MPICH's mpirun)", 4, 1)),
        (STEP, Started("srun --mpi=none", 4, 1, "none")),
        (STEP | {"PMI_SIZE": "4", "PMI_RANK": "1"}, Started("srun --mpi=pmi2", 4, 1, "pmi2")),
        (STEP | {"PMIX_RANK": "1"}, Started("srun --mpi=pmix", 4, 1, "pmix")),
    ],
)
def test_who_started_this_rank(environ: dict[str, str], found: Started | None) -> None:
    assert started(environ) == found


@pytest.mark.parametrize(
    ("text", "found"), [("", []), ("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x2),1", [2, 2, 1]), ("12,3(x2)", [12, 3, 3])]
)
def test_how_slurm_writes_tasks_per_node(text: str, found: list[int]) -> None:
    assert tasks_per_node(text) == found


@pytest.mark.parametrize(
    ("sizes", "environ", "level", "says"),
    [
        ([4], {}, "ok", "1 x 4 (nodes x ranks)"),
        ([2, 2], STEP | ALLOCATION, "ok", "2 x 2 (nodes x ranks)"),
        ([4], STEP | ALLOCATION, "FAIL", "but SLURM placed 2 x 2: this MPI takes ranks of several nodes for one"),
        ([1, 1, 1, 1], STEP | ALLOCATION, "WARN", "but SLURM placed 2 x 2: do containers keep ranks of a node apart?"),
        ([1, 3], STEP | ALLOCATION, "WARN", "1 x 1, 1 x 3 (nodes x ranks), but SLURM placed 2 x 2"),
        ([1], ALLOCATION, "WARN", "but the allocation has 4 tasks: start the ranks with srun, without -n"),
        ([4], MPICH | ALLOCATION, "WARN", "1 node(s) of the allocation are idle"),
        ([2, 2], MPICH | ALLOCATION, "ok", "2 x 2"),
        ([2, 2], STEP | {"MPIDL_NODE_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "4"}, "ok", "pretended"),
    ],
)
def test_nodes_against_the_allocation(sizes: list[int], environ: dict[str, str], level: str, says: str) -> None:
    found, text = against_allocation(sizes, environ)
    assert found == level, text
    assert says in text


def test_mpich_under_pmix_is_warned_of_before_it_may_die() -> None:
    first = STEP | {"PMIX_RANK": "0", "SLURM_PROCID": "0"}
    warning = foreseen("MPICH", first)
    assert warning is not None
    assert "srun --mpi=pmi2" in warning.text
    assert foreseen("Open MPI", first) is None
    assert foreseen("MPICH", first | {"SLURM_PROCID": "1"}) is None  # the first rank only
    assert foreseen("MPICH", STEP) is None
    assert foreseen("MPICH", {}) is None
