"""`mpidl doctor` on the launch: who started these ranks, did they find each other, are they where SLURM put them?

What a launcher tells is read from the environment of the rank, which `started` does for any environment.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.cli.doctor.finding import Finding
from mpidl.errors import LauncherError
from mpidl.native.environment import NODE_SIZE

if TYPE_CHECKING:
    from mpidl.collectives.communicator import Communicator

# By which of srun's plugins a library's ranks find each other; others build their MPI for both.
_PLUGINS = {"Open MPI": "pmix", "MPICH": "pmi2", "Intel(R) MPI": "pmi2", "MVAPICH": "pmi2"}


@dataclass(frozen=True)
class Started:
    """What the launcher told this process, which MPI has no part in."""

    by: str  # the launcher, for messages
    size: int
    rank: int
    plugin: str | None = None  # of srun: 'pmi2' | 'pmix' | 'none'; None where mpirun started the ranks


def started(environ: Mapping[str, str]) -> Started | None:
    """Reads which launcher started this process as one of how many ranks; None: nobody did.

    mpirun comes first: inside an allocation it starts its helpers by srun, whose variables the ranks inherit.
    """
    if (found := _numbers(environ, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")) is not None:
        return Started("Open MPI's mpirun", *found)
    told = _numbers(environ, "PMI_SIZE", "PMI_RANK")
    step = _numbers(environ, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if told is not None and (step != told or "MPI_LOCALNRANKS" in environ):
        return Started("a PMI launcher (MPICH's mpirun)", *told)
    if step is None or "SLURM_STEP_ID" not in environ:
        return None
    plugin = "pmi2" if told is not None else "pmix" if "PMIX_RANK" in environ else "none"
    return Started(f"srun --mpi={plugin}", *step, plugin)


def _numbers(environ: Mapping[str, str], size: str, rank: str) -> tuple[int, int] | None:
    """Two variables as numbers, if the first is one; a rank that is not told counts as 0."""
    if not environ.get(size, "").isdigit():
        return None
    return int(environ[size]), int(environ.get(rank, "0"))


def speaks(world: Communicator) -> bool:
    """Whether this rank prints: the first, also where each rank takes itself for the only one."""
    found = started(os.environ)
    return world.rank == 0 and (found is None or found.rank == 0)


def foreseen(library: str, environ: Mapping[str, str]) -> Finding | None:
    """What must be said before MPI starts, since the start may end the process: MPICH does so under PMIx."""
    found = started(environ)
    if found is None or found.rank != 0 or found.plugin != "pmix" or _PLUGINS.get(library) != "pmi2":
        return None
    return Finding(
        "WARN",
        "PMI",
        f"srun offers PMIx, which {library} speaks only if it was built for it: if MPI cannot start now, "
        "start with srun --mpi=pmi2",
    )


def launcher(world: Communicator) -> Finding:
    """How these ranks were started, and whether the launcher and the library belong together."""
    found = started(os.environ)
    if found is None:
        return _available_launcher()
    if found.size == world.size:
        return Finding("ok", "launcher", f"{found.by}, {world.size} ranks")
    return Finding("FAIL", "launcher", _apart(found, world.size), final=True)


def _apart(found: Started, seen: int) -> str:
    """The classical failure: ranks that do not find each other, each of which would train alone."""
    from mpidl.mpi import runtime

    library = runtime.mpi_description()["library"]
    text = f"{found.by} started {found.size} ranks and {library} sees {seen}: "
    if found.plugin is None:
        return text + (
            "the launcher belongs to another MPI than the library; "
            "use the mpirun beside this python, as `mpidl run` does"
        )
    wanted = _PLUGINS.get(library)
    text += "they did not find each other, and each would train alone; "
    if wanted is None or wanted == found.plugin:
        return text + f"this {library} was built without SLURM's PMI: use one that was, or start the ranks with mpirun"
    return text + (
        f"start with srun --mpi={wanted} (in jobs/site.sh: SLURM_MPI_TYPE={wanted}); "
        "if `srun --mpi=list` does not name it, start the ranks with mpirun"
    )


def _available_launcher() -> Finding:
    """For one rank that nobody launched: what `mpidl run` would use."""
    from mpidl.cli.launch.launcher import plan
    from mpidl.mpi import runtime

    try:
        launch = plan(2, ["true"])
    except LauncherError as error:
        return Finding("FAIL", "launcher", str(error))
    library = runtime.mpi_description()["library"]
    if launch.kind != "srun" and (launch.kind == "openmpi") != (library == "Open MPI"):
        return Finding(
            "FAIL",
            "launcher",
            f"{launch.argv[0]} is of {launch.kind} and the library is {library}: put {library}'s mpirun first on PATH",
        )
    return Finding("ok", "launcher", f"none: this is one rank; `mpidl run` would use {launch.argv[0]} ({launch.kind})")


def ranks_per_node(world: Communicator) -> Finding:
    """How the ranks are spread, and whether that is how SLURM spread them."""
    level, text = against_allocation(Counter(world.topology.placement.nodes).values(), os.environ)
    return Finding(level, "ranks per node", text)


def against_allocation(sizes: Iterable[int], environ: Mapping[str, str]) -> tuple[str, str]:
    """Compares the nodes that MPI sees with SLURM's.

    Args:
        sizes: ranks on each node, in any order.
        environ: where SLURM's variables stand, if there are any.

    Returns:
        A finding's level and text.
    """
    seen = sorted(sizes)
    text = f"{_spread(seen)} (nodes x ranks)"
    if NODE_SIZE.text(environ):
        return "ok", f"{text}, pretended by {NODE_SIZE.name}"
    found = started(environ)
    if found is not None and found.plugin is not None and found.size == sum(seen):
        placed = sorted(tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "")))
        if placed and len(seen) < len(placed):
            return "FAIL", f"{text}, but SLURM placed {_spread(placed)}: this MPI takes ranks of several nodes for one"
        if placed and placed != seen:
            return "WARN", f"{text}, but SLURM placed {_spread(placed)}: do containers keep ranks of a node apart?"
    tasks = environ.get("SLURM_NTASKS", "")
    if tasks.isdigit() and sum(seen) < int(tasks):
        return "WARN", f"{text}, but the allocation has {tasks} tasks: start the ranks with srun, without -n"
    unused = int(environ.get("SLURM_JOB_NUM_NODES", "0")) - len(seen)
    if unused > 0:
        return "WARN", f"{text}: {unused} node(s) of the allocation are idle; start the ranks with srun, without -N"
    return "ok", text


def tasks_per_node(text: str) -> list[int]:
    """Reads SLURM's way of writing them: "2(x3),1" is 2, 2, 2, 1."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found


def _spread(sizes: list[int]) -> str:
    return ", ".join(f"{count} x {size}" for size, count in sorted(Counter(sizes).items()))
