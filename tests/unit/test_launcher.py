"""Which launcher is chosen and what it is given; mpirun and srun are here small scripts that name themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mpidl.cli.launch import launcher
from mpidl.errors import ArgumentError, LauncherError

OPEN_MPI = "mpirun (Open MPI) 5.0.11"
MPICH = "HYDRA build details:\n    Version: 5.0.2"


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a python without an mpirun beside it."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def test_the_mpirun_beside_python_comes_before_the_one_on_path(own: Path, tmp_path: Path) -> None:
    program(tmp_path / "other" / "mpirun", OPEN_MPI)
    mine = program(own / "mpirun", MPICH)
    path = f"{tmp_path / 'other'}{os.pathsep}{os.defpath}"
    launch = launcher.plan(3, ["prog", "-x", "a b"], environ={"PATH": path})
    assert launch.argv == (str(mine), "-n", "3", "prog", "-x", "a b")
    assert launch.kind == "mpich"
    assert launch.environment == {"PATH": f"{own}{os.pathsep}{path}"}  # so that `python` is this environment's


def test_mpirun_on_path_is_found(own: Path, tmp_path: Path) -> None:
    mpirun = program(tmp_path / "site" / "mpirun", MPICH)
    launch = launcher.plan(1, ["prog"], environ={"PATH": f"{mpirun.parent}{os.pathsep}{os.defpath}"})
    assert launch.argv[0] == str(mpirun)


def test_path_is_left_alone_where_the_own_folder_is_on_it(own: Path) -> None:
    program(own / "mpirun", MPICH)
    assert launcher.plan(1, ["prog"], environ={"PATH": f"{own}{os.pathsep}{os.defpath}"}).environment == {}


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_open_mpi_gets_what_root_and_oversubscription_need_and_only_then(
    own: Path, monkeypatch: pytest.MonkeyPatch, root: bool, ranks: int
) -> None:
    program(own / "mpirun", f"#{root}{ranks}\n{OPEN_MPI}")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(launcher, "physical_cores", lambda: 2)
    launch = launcher.plan(ranks, ["prog"], environ={"PATH": f"{own}{os.pathsep}{os.defpath}"})
    assert launch.kind == "openmpi"
    assert launch.environment["OMPI_MCA_osc"] == "^ucx"
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in launch.environment) == root
    assert ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM" in launch.environment) == root
    assert ("PRTE_MCA_rmaps_default_mapping_policy" in launch.environment) == (ranks > 2)


def test_what_the_user_set_is_kept(own: Path) -> None:
    program(own / "mpirun", OPEN_MPI)
    environ = {"PATH": f"{own}{os.pathsep}{os.defpath}", "OMPI_MCA_osc": "rdma"}
    assert "OMPI_MCA_osc" not in launcher.plan(2, ["prog"], environ=environ).environment


@pytest.mark.parametrize(("says", "plugin"), [(MPICH, "pmi2"), (OPEN_MPI, "pmix")])
def test_srun_starts_the_ranks_inside_an_allocation(own: Path, tmp_path: Path, says: str, plugin: str) -> None:
    program(own / "mpirun", says)
    srun = program(tmp_path / "slurm" / "srun", "")
    path = f"{own}{os.pathsep}{srun.parent}{os.pathsep}{os.defpath}"
    launch = launcher.plan(4, ["prog"], environ={"PATH": path, "SLURM_JOB_ID": "7"})
    assert launch.argv == (str(srun), f"--mpi={plugin}", "-n", "4", "prog")
    assert launch.kind == "srun"
    assert launcher.plan(4, ["prog"], environ={"PATH": path}).kind != "srun"  # outside an allocation


def test_no_launcher_is_one_sentence_with_what_to_install(own: Path, tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match=r"no mpirun.*pip install 'mpidl\[mpich\]'"):
        launcher.plan(2, ["prog"], environ={"PATH": str(tmp_path)})


def test_an_unknown_mpi_is_refused_by_its_own_words(own: Path) -> None:
    program(own / "mpirun", "Fancy MPI 1.0")
    with pytest.raises(LauncherError, match="Fancy MPI"):
        launcher.plan(2, ["prog"], environ={"PATH": f"{own}{os.pathsep}{os.defpath}"})


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"])
def test_a_rank_starts_no_ranks(own: Path, variable: str) -> None:
    program(own / "mpirun", MPICH)
    with pytest.raises(LauncherError, match=variable):
        launcher.plan(2, ["prog"], environ={"PATH": os.defpath, variable: "0"})


@pytest.mark.parametrize(("ranks", "argv"), [(0, ["prog"]), (-1, ["prog"]), (2, [])])
def test_nothing_to_start_is_refused(own: Path, ranks: int, argv: list[str]) -> None:
    program(own / "mpirun", MPICH)
    with pytest.raises(ArgumentError):
        launcher.plan(ranks, argv)


def test_physical_cores_are_at_most_the_usable_cpus() -> None:
    assert 1 <= launcher.physical_cores() <= len(os.sched_getaffinity(0))


def test_the_environment_the_tests_run_in_has_an_mpirun_that_is_known() -> None:
    assert launcher.plan(2, ["prog"]).kind in ("mpich", "openmpi", "srun")


def test_a_plugin_that_the_user_chose_for_srun_stays(own: Path, tmp_path: Path) -> None:
    program(own / "mpirun", MPICH)
    srun = program(tmp_path / "slurm" / "srun", "srun")
    environ = {"PATH": f"{own}{os.pathsep}{srun.parent}", "SLURM_JOB_ID": "1", "SLURM_MPI_TYPE": "pmix_v4"}
    assert launcher.plan(2, ["prog"], environ=environ).argv == (str(srun), "-n", "2", "prog")
