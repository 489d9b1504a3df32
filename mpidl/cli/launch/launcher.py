"""How N ranks are started on this machine: which launcher, with which variables. MPI is not imported here.

`plan` only decides; starting the processes and passing on signals is `mpidl.cli.launch.run`'s part, and the test suite
starts its ranks by the same plan.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpidl.errors import ArgumentError, LauncherError

INSTALL_HINT = "pip install 'mpidl[mpich]' brings one; Debian: apt install mpich; on a cluster: module load"

# Set by a launcher in each rank; a launcher that inherits them would take itself for a rank.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


@dataclass(frozen=True)
class Launch:
    """A command that starts the ranks, and what it adds to the environment."""

    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)  # additions only
    kind: str = "mpich"  # 'mpich' | 'openmpi' | 'srun'


def plan(ranks: int, program: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Launch:
    """Decide how to start `ranks` ranks of `program`; nothing is started.

    Args:
        ranks: how many, at least 1.
        program: the program and its arguments.
        environ: the environment to decide by; the process's own if None. What it already sets is left as it is.

    Returns:
        The command, the environment's additions, and the kind of launcher.

    Raises:
        ArgumentError: no rank or no program was asked for.
        LauncherError: no launcher was found, or this process is itself a rank.
    """
    environ = os.environ if environ is None else environ
    if ranks < 1:
        raise ArgumentError(f"the number of ranks must be at least 1, found {ranks}")
    if not program:
        raise ArgumentError("no program was given to start")
    _refuse_inside_a_rank(environ)
    path = _path_with_own_folder(environ)
    added = {} if path == environ.get("PATH") else {"PATH": path}
    mpirun = _mpirun(path)
    srun = shutil.which("srun", path=path) if "SLURM_JOB_ID" in environ else None
    if srun is not None:
        # A plugin that the user chose in srun's own variable stays.
        plugin = () if environ.get("SLURM_MPI_TYPE") else (f"--mpi={slurm_plugin(environ)}",)
        return Launch((srun, *plugin, "-n", str(ranks), *program), added, "srun")
    if mpirun is None:
        raise LauncherError(f"no mpirun was found beside {sys.executable} or on PATH: {INSTALL_HINT}")
    kind = implementation(mpirun)
    if kind == "openmpi":
        wanted = _open_mpi_variables(ranks)
        added |= {name: value for name, value in wanted.items() if name not in environ}
    return Launch((mpirun, "-n", str(ranks), *program), added, kind)


@functools.lru_cache(maxsize=8)
def implementation(mpirun: str) -> str:
    """Ask `mpirun --version` once whose it is: 'mpich' (and what is built like it) or 'openmpi'.

    Raises:
        LauncherError: it does not answer, or names an MPI that mpidl does not know.
    """
    try:
        answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(f"{mpirun} --version gave no answer: {error}") from error
    words = answer.stdout + answer.stderr
    if "Open MPI" in words or "OpenRTE" in words or "PRRTE" in words:
        return "openmpi"
    if "HYDRA" in words or "Intel(R) MPI" in words or "MVAPICH" in words:
        return "mpich"
    first = words.strip().splitlines()[0] if words.strip() else "nothing"
    raise LauncherError(f"{mpirun} is of an MPI unknown to mpidl; --version says: {first}")


def _refuse_inside_a_rank(environ: Mapping[str, str]) -> None:
    for name in _RANK_VARIABLES:
        if name in environ:
            raise LauncherError(
                f"this process was itself started as a rank ({name}={environ[name]}): start the ranks from outside"
            )


def _own_folder() -> str:
    return str(Path(sys.executable).parent)


def _path_with_own_folder(environ: Mapping[str, str]) -> str:
    """PATH such that `python` and `mpidl` in a program are this environment's, also when it is not activated."""
    path = environ.get("PATH", os.defpath)
    own = _own_folder()
    return path if own in path.split(os.pathsep) else f"{own}{os.pathsep}{path}"


def _open_mpi_variables(ranks: int) -> dict[str, str]:
    """What Open MPI's mpirun needs on this machine (each one tried).

    Binding is off, since Open MPI ties each of two ranks to one core and leaves the others idle; cores are shared
    by the threads that each rank takes. `osc` without ucx hides a harmless warning of every window.
    """
    variables = {"OMPI_MCA_osc": "^ucx", "PRTE_MCA_hwloc_default_binding_policy": "none"}
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if ranks > physical_cores():
        variables["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    return variables


def physical_cores() -> int:
    """Cores, not hardware threads, that this process may use: what Open MPI counts as slots."""
    return len({_siblings(cpu) for cpu in _usable_cpus()})


def _usable_cpus() -> Iterable[int]:
    return sorted(os.sched_getaffinity(0))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def slurm_plugin(environ: Mapping[str, str] | None = None) -> str:
    """What `srun --mpi=` must name: MPICH and its kin speak pmi2, Open MPI 5 pmix; without an mpirun to ask, pmix.

    Raises:
        LauncherError: the mpirun beside this Python, or the first on PATH, is of an MPI that mpidl does not know.
    """
    mpirun = _mpirun(_path_with_own_folder(os.environ if environ is None else environ))
    return "pmi2" if mpirun is not None and implementation(mpirun) == "mpich" else "pmix"


def _mpirun(path: str) -> str | None:
    """The mpirun beside this Python, else the first on `path`."""
    return shutil.which("mpirun", path=f"{_own_folder()}{os.pathsep}{path}")
