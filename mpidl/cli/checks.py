"""What `mpidl doctor` looks at: every check is a collective over all ranks and returns the same finding on each.

Nothing is printed here, and no time limit is kept: that is `mpidl.cli.doctor`'s part.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpidl.errors import ArgumentError, ExtensionError, LauncherError

if TYPE_CHECKING:
    from mpidl.communicator import Communicator

_SMALL_SHARED_MEMORY = 256 * 2**20  # bytes; containers give 64 MiB unless told otherwise
_ASLEEP = 0.5  # seconds that a rank stays outside MPI while the others write to it

# What launchers tell each rank of the number of ranks.
_SIZE_VARIABLES = {"OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun", "PMI_SIZE": "a PMI launcher (MPICH's mpirun, srun)"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str  # 'ok' | 'WARN' | 'FAIL'
    subject: str
    text: str  # what was found, and what to do if it is not ok


def start() -> Communicator:
    """Starts MPI and returns all ranks; a collective."""
    import mpidl

    world: Communicator = mpidl.world()
    return world


def mpi_library(world: Communicator) -> Finding:
    """The MPI library and its version, the same on all ranks."""
    from mpidl import runtime

    found = Counter(f"{d['library']} {d['version']}" for d in _everywhere(world, runtime.mpi_description()))
    if len(found) > 1:
        return Finding(
            "FAIL", "MPI", f"the ranks run on different ones ({_counted(found)}): start all from one environment"
        )
    return Finding("ok", "MPI", f"{next(iter(found))}, standard {runtime.mpi_description()['standard']}")


def thread_level(world: Communicator) -> Finding:
    """Whether threads of a rank may call MPI at the same time."""
    from mpidl import runtime

    levels = Counter(d["thread_level"] for d in _everywhere(world, runtime.mpi_description()))
    if set(levels) == {"multiple"}:
        return Finding("ok", "thread level", "multiple")
    return Finding(
        "WARN",
        "thread level",
        f"{_counted(levels)}: no helper thread can be used; import mpidl before mpi4py.MPI, or use an MPI with threads",
    )


def launcher(world: Communicator) -> Finding:
    """How these ranks were started, and whether the launcher and the library belong together."""
    told = {name: int(os.environ[name]) for name in _SIZE_VARIABLES if os.environ.get(name, "").isdigit()}
    name = next(iter(told), None)
    if name is not None and told[name] != world.size:
        return Finding(
            "FAIL",
            "launcher",
            f"{_SIZE_VARIABLES[name]} started {told[name]} ranks and MPI sees {world.size}: the launcher belongs to "
            "another MPI than the library; use the mpirun beside this python, as `mpidl run` does",
        )
    if name is not None:
        return Finding("ok", "launcher", f"{_SIZE_VARIABLES[name]}, {world.size} ranks")
    return _available_launcher()


def _available_launcher() -> Finding:
    """For one rank that nobody launched: what `mpidl run` would use."""
    from mpidl import runtime
    from mpidl.cli.launcher import plan

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
    """How the ranks are spread."""
    sizes = Counter(_everywhere(world, world.node.size))
    nodes = {size: count // size for size, count in sizes.items()}
    spread = ", ".join(f"{count} x {size}" for size, count in sorted(nodes.items()))
    return Finding("ok", "ranks per node", f"{spread} (nodes x ranks)")


def threads(world: Communicator) -> Finding:
    """torch's threads per rank against the cores that its ranks share."""
    import torch

    from mpidl import runtime

    sharing = world.topology.ranks_on_my_cores()
    mine = {"threads": torch.get_num_threads(), "cores": len(runtime.cores()), "sharing": sharing}
    everyone = _everywhere(world, mine)
    worst = max(everyone, key=lambda one: one["threads"] * one["sharing"] / one["cores"])
    text = f"{worst['threads']} per rank, {worst['sharing']} rank(s) on the same {worst['cores']} core(s)"
    if worst["sharing"] > worst["cores"]:
        return Finding("WARN", "torch threads", f"{text}: more ranks than cores; right for a try, slow for work")
    if worst["threads"] * worst["sharing"] > worst["cores"]:
        return Finding("WARN", "torch threads", f"{text}: unset OMP_NUM_THREADS, or set it to cores / ranks")
    return Finding("ok", "torch threads", text)


def shared_memory(world: Communicator) -> Finding:
    """The room in /dev/shm, through which ranks of one node exchange data."""
    try:
        usage = shutil.disk_usage("/dev/shm")
        mine = {"total": usage.total, "free": usage.free}
    except OSError:
        mine = {"total": 0, "free": 0}
    least = min(_everywhere(world, mine), key=lambda one: int(one["free"]))
    if least["total"] == 0:
        return Finding("FAIL", "shared memory", "no /dev/shm on some node: mount a tmpfs there")
    text = f"/dev/shm has {least['free'] / 2**20:.0f} of {least['total'] / 2**20:.0f} MiB free"
    if least["free"] < _SMALL_SHARED_MEMORY:
        return Finding("WARN", "shared memory", f"{text}: remove old files, or give the container more (--shm-size=1g)")
    return Finding("ok", "shared memory", text)


def extension(world: Communicator) -> Finding:
    """Whether the compiled extension loads on every rank and packs what it should."""
    answers = _everywhere(world, _extension_answer())
    complaints = [one["complaint"] for one in answers if one["complaint"]]
    if complaints:
        return Finding("FAIL", "extension", complaints[0])
    used = sorted({one["instructions"] for one in answers})
    return Finding("ok", "extension", f"loaded; packing works, with {' and '.join(used)} instructions")


def _extension_answer() -> dict[str, str]:
    import numpy as np

    import mpidl
    from mpidl import _native

    out = np.zeros(3, np.float32)
    try:
        packed = mpidl.pack([np.ones(2, np.float32), np.ones(1, np.float32)], out, scale=2.0)
    except (ExtensionError, ArgumentError) as error:
        return {"complaint": str(error)}
    wrong = packed.count != 3 or not (out == 2).all()
    complaint = "packing gives wrong numbers: reinstall mpidl, with a compiler of this machine" if wrong else ""
    return {"complaint": complaint, "instructions": _native.instructions()}


def one_sided(world: Communicator) -> Finding:
    """Accumulate, read and fetch-and-add on every pair of neighbours, and towards a rank that is outside MPI."""
    import numpy as np

    from mpidl.window import Window

    window = Window(world.topology, 1024, "int64", "mpidl doctor's window")
    window.fill(np.zeros(1024, np.int64))
    waited = _while_rank_0_is_away(world, window)
    right = (world.rank + 1) % world.size
    window.add(right, 1, np.arange(1, 1024, dtype=np.int64) * (world.rank + 1))
    window.flush(right)
    world.barrier()
    found = np.empty(1024, np.int64)
    window.read(world.rank, 0, found)
    window.flush(world.rank)
    left = (world.rank - 1) % world.size
    sound = bool((found[1:] == np.arange(1, 1024) * (left + 1)).all())
    counted = window.fetch_add(0, 0, 0) == world.size
    window.close()
    results = _everywhere(world, {"sound": sound and counted, "waited": waited})
    if not all(one["sound"] for one in results):
        return Finding(
            "FAIL", "one-sided MPI", "updates were lost: the asynchronous algorithms cannot be used with this MPI"
        )
    longest = max(one["waited"] for one in results)
    if longest > _ASLEEP / 2:
        return Finding(
            "WARN",
            "one-sided MPI",
            f"right, but a rank outside MPI kept others waiting for {longest:.2f} s: workers will wait for each other",
        )
    return Finding(
        "ok", "one-sided MPI", f"{world.size} rank(s), right; {longest * 1e3:.1f} ms towards a sleeping rank"
    )


def _while_rank_0_is_away(world: Communicator, window: Any) -> float:
    """Each rank adds 1 to rank 0's first element while rank 0 sleeps; returns this rank's seconds for it."""
    world.barrier()
    if world.rank == 0:
        time.sleep(_ASLEEP)
    started = time.perf_counter()
    window.fetch_add(0, 0, 1)
    seconds = time.perf_counter() - started
    world.barrier()
    return seconds


CHECKS: tuple[Callable[[Communicator], Finding], ...] = (
    mpi_library,
    thread_level,
    launcher,
    ranks_per_node,
    threads,
    shared_memory,
    extension,
    one_sided,
)


def _everywhere(world: Communicator, mine: Any) -> list[Any]:
    """Every rank's value, any that JSON has; a collective."""
    return [json.loads(text) for text in world.topology.gather_bytes(json.dumps(mine).encode(), "mpidl doctor")]


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} on {count} rank(s)" for name, count in found.items())
