"""`mpidl doctor`: every line for one rank and for several, what it says without MPI and of a wrong launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bed import FOLDER
from launching import MPIDL, environment_for_tests, run_ranks

from mpidl.cli.launch.launcher import slurm_plugin
from mpidl.native import library

SUBJECTS = [
    "MPI",
    "thread level",
    "launcher",
    "ranks per node",
    "torch threads",
    "shared memory",
    "extension",
    "GPU arrays",
    "one-sided MPI",
]
SPEED = "speed in a node"  # of two ranks or more
BETWEEN = ["one-sided between nodes", "speed between nodes"]  # of two nodes or more
DOCTOR = [MPIDL, "doctor"]


def lines(text: str) -> dict[str, str]:
    """Subject -> its whole line; each line once."""
    found = [line for line in text.splitlines() if line.startswith(("ok ", "WARN ", "FAIL "))]
    by_subject = {line[6:].partition(":")[0]: line for line in found}
    assert len(by_subject) == len(found), text
    return by_subject


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_sound_machine_gets_one_line_for_each_thing(ranks: int) -> None:
    result = run_ranks(ranks, DOCTOR, timeout=120)
    report = lines(result.stdout)
    assert list(report) == SUBJECTS + [SPEED] * (ranks > 1), result.output
    assert result.returncode == 0
    assert not [line for line in report.values() if line.startswith("FAIL")]
    assert f"{ranks} rank" in report["launcher"]
    assert f"1 x {ranks}" in report["ranks per node"]
    assert f"{ranks} rank(s), right" in report["one-sided MPI"]
    assert "mpidl was built without CUDA" in report["GPU arrays"] or "mpidl_cuda_allocate" in report["GPU arrays"]
    assert report["extension"].endswith(f"packing works, with {library.instructions()} instructions")
    crowded = ranks > len(os.sched_getaffinity(0))
    assert report["torch threads"].startswith("WARN" if crowded else "ok")


@pytest.mark.any_mpi
def test_memory_that_is_not_shared_is_said_to_be_and_too_many_threads_are_a_warning() -> None:
    threads = len(os.sched_getaffinity(0))  # all cores, for each of the two ranks
    variables = {"MPIDL_SHARED_MEMORY": "0", "OMP_NUM_THREADS": str(threads)}
    report = lines(run_ranks(2, DOCTOR, timeout=120, env=variables).stdout)
    assert "not used: ranks of a node exchange their data by MPI" in report["shared memory"]
    assert report["torch threads"].startswith("WARN")
    assert "OMP_NUM_THREADS" in report["torch threads"]


def test_several_nodes_get_lines_of_their_own() -> None:
    result = run_ranks(3, DOCTOR, timeout=120, env={"MPIDL_NODE_SIZE": "1"})
    report = lines(result.stdout)
    assert list(report) == SUBJECTS + BETWEEN, result.output
    assert result.returncode == 0
    assert report["ranks per node"].endswith("3 x 1 (nodes x ranks), pretended by MPIDL_NODE_SIZE")
    assert "64 KiB from each of 2 rank(s), right" in report["one-sided between nodes"]
    assert " us, " in report["speed between nodes"]


def test_ranks_of_srun_that_do_not_find_each_other_are_named_by_the_first_only() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    first, second = (alone(**step, SLURM_PROCID=rank) for rank in ("0", "1"))
    assert (first.returncode, second.returncode) == (1, 1)
    report = lines(first.stdout)
    assert report["launcher"].startswith("FAIL  launcher: srun --mpi=none started 4 ranks and ")
    assert f"start with srun --mpi={slurm_plugin()} (in jobs/site.sh: SLURM_MPI_TYPE=" in report["launcher"]
    assert list(report)[-1] == "launcher"  # the rest would be of single ranks
    assert second.stdout == ""


def alone(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The doctor as one process that nobody launched."""
    environment = environment_for_tests(variables)
    return subprocess.run(
        [*DOCTOR, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_without_a_launcher_it_names_the_one_that_run_would_use() -> None:
    done = alone()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`mpidl run` would use" in lines(done.stdout)["launcher"]


@pytest.mark.any_mpi
def test_instructions_that_packing_does_not_have_are_a_failure() -> None:
    done = alone(MPIDL_INSTRUCTIONS="sse9")
    assert done.returncode == 1
    assert "FAIL  extension: MPIDL_INSTRUCTIONS='sse9', which is not known: expected one of" in done.stdout


@pytest.mark.any_mpi
def test_without_mpi_one_sentence_says_what_to_install() -> None:
    done = alone(MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("FAIL  MPI: no MPI library could be loaded")
    assert "pip install 'mpidl[mpich]'" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_launcher_of_another_mpi_is_a_failure() -> None:
    done = alone(OMPI_COMM_WORLD_SIZE="4")  # what ranks see whose library does not know their launcher
    assert done.returncode == 1
    assert lines(done.stdout)["launcher"].startswith("FAIL")
    assert "started 4 ranks and" in done.stdout
    assert "sees 1: the launcher belongs to another MPI" in done.stdout


def test_what_hangs_is_reported_within_the_time_limit() -> None:
    program = (
        "import sys, time\n"
        "from mpidl.one_sided.window import Window\n"
        "Window.fetch_add = lambda *_: time.sleep(1000)\n"  # a call into MPI that never comes back
        "from mpidl.cli import main\n"
        "main(['doctor', '--time-limit', '6'])\n"
    )
    result = run_ranks(2, [sys.executable, "-c", program], timeout=100)
    assert not result.timed_out
    assert result.returncode != 0
    assert "FAIL  time limit: hangs: the check one_sided did not come back within 6 s" in result.stdout


STAGED = "go to MPI through pinned host memory "


def on_a_gpu(kind: str) -> str:
    """The doctor as a program, with the tests' device as its GPU, and a child of that kind to try MPI on it."""
    host = Path(__file__).parents[1] / "cuda_host"
    return (
        f"import sys; sys.path.insert(0, {str(host)!r})\n"
        "from host_build import host_cuda\n"
        "from mpidl.arrays import devices\n"
        "from mpidl.mpi import cuda_aware\n"
        "devices.register('cuda', lambda number: devices.Device(host_cuda(), number, lambda _: 0))\n"
        "cuda_aware._TIME_LIMIT = 60\n"
        f"program = [sys.executable, {str(host / 'probe_child.py')!r}, {kind!r}]\n"
        "cuda_aware._command = lambda device: [*program, device, '60']\n"
        "from mpidl.cli import main\n"
        "main(['doctor', '--time-limit', '90'])\n"
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which the tests' device is built once."""
    return str(tmp_path_factory.mktemp("device"))


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("ranks", "kind", "setting", "line"),
    [
        (2, "aware", "auto", "ok    GPU arrays: go to MPI directly (shown by a child process)"),
        (1, "unaware", "auto", f"ok    GPU arrays: {STAGED}(the child process that tried it was ended by signal 11)"),
        (1, "aware", "", f"ok    GPU arrays: {STAGED}(MPIDL_CUDA_AWARE=0)"),
        (1, "aware", "yes", "FAIL  GPU arrays: MPIDL_CUDA_AWARE='yes': expected 0"),
    ],
    ids=["shown", "crashes", "off", "nonsense"],
)
def test_how_arrays_on_a_gpu_come_to_mpi(built: str, ranks: int, kind: str, setting: str, line: str) -> None:
    variables = {"MPIDL_CUDA_AWARE": setting, FOLDER: built}
    result = run_ranks(ranks, [sys.executable, "-c", on_a_gpu(kind)], timeout=200, env=variables)
    assert line in result.stdout, result.output
    assert result.returncode == line.startswith("FAIL")
