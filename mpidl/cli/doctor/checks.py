"""What `mpidl doctor` looks at: every check is a collective over all ranks and returns the same finding on each.

Nothing is printed here, and no time limit is kept: that is `mpidl.cli.doctor.command`'s part.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from mpidl.cli.doctor.finding import Finding, everywhere
from mpidl.cli.doctor.launch_checks import launcher, ranks_per_node
from mpidl.cli.doctor.network_checks import one_sided, one_sided_between_nodes, speed_between_nodes, speed_in_nodes
from mpidl.errors import ArgumentError, DeviceError, ExtensionError

if TYPE_CHECKING:
    from mpidl.collectives.communicator import Communicator

Check: TypeAlias = "Callable[[Communicator], Finding | None]"  # None: it has no object, such as a second node
_DEVICE = "cuda:0"  # of the GPUs that this rank sees; MPI treats all alike
_SMALL_SHARED_MEMORY = 256 * 2**20  # bytes; containers give 64 MiB unless told otherwise


def start() -> Communicator:
    """Starts MPI and returns all ranks; a collective."""
    import mpidl

    world: Communicator = mpidl.world()
    return world


def load(world: Communicator) -> None:
    """Imports torch on all ranks: from one disk that takes long, which must not count as a check that hangs."""
    import torch  # noqa: F401

    world.barrier()


def mpi_library(world: Communicator) -> Finding:
    """The MPI library and its version, the same on all ranks."""
    from mpidl.mpi import runtime

    found = Counter(f"{d['library']} {d['version']}" for d in everywhere(world, runtime.mpi_description()))
    if len(found) > 1:
        return Finding(
            "FAIL", "MPI", f"the ranks run on different ones ({_counted(found)}): start all from one environment"
        )
    return Finding("ok", "MPI", f"{next(iter(found))}, standard {runtime.mpi_description()['standard']}")


def thread_level(world: Communicator) -> Finding:
    """Whether threads of a rank may call MPI at the same time."""
    from mpidl.mpi import runtime

    levels = Counter(d["thread_level"] for d in everywhere(world, runtime.mpi_description()))
    if set(levels) == {"multiple"}:
        return Finding("ok", "thread level", "multiple")
    return Finding(
        "WARN",
        "thread level",
        f"{_counted(levels)}: no progress thread can run; import mpidl before mpi4py.MPI, or use an MPI with threads",
    )


def threads(world: Communicator) -> Finding:
    """torch's threads per rank against the cores that its ranks share."""
    import torch

    from mpidl.mpi import runtime

    sharing = world.topology.ranks_on_my_cores()
    mine = {"threads": torch.get_num_threads(), "cores": len(runtime.cores()), "sharing": sharing}
    everyone = everywhere(world, mine)
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
    least = min(everywhere(world, mine), key=lambda one: int(one["free"]))
    if least["total"] == 0:
        return Finding("FAIL", "shared memory", "no /dev/shm on some node: mount a tmpfs there")
    text = f"/dev/shm has {least['free'] / 2**20:.0f} of {least['total'] / 2**20:.0f} MiB free"
    if least["free"] < _SMALL_SHARED_MEMORY:
        return Finding("WARN", "shared memory", f"{text}: remove old files, or give the container more (--shm-size=1g)")
    if world.node.size > 1 and not world.node.shares_memory:
        text += "; not used: ranks of a node exchange their data by MPI (MPIDL_SHARED_MEMORY=0, or MPIDL_CUDA_AWARE)"
    return Finding("ok", "shared memory", text)


def extension(world: Communicator) -> Finding:
    """Whether the compiled extension loads on every rank and packs what it should."""
    answers = everywhere(world, _extension_answer())
    complaints = [one["complaint"] for one in answers if one["complaint"]]
    if complaints:
        return Finding("FAIL", "extension", complaints[0])
    used = sorted({one["instructions"] for one in answers})
    return Finding("ok", "extension", f"loaded; packing works, with {' and '.join(used)} instructions")


def _extension_answer() -> dict[str, str]:
    import numpy as np

    import mpidl
    from mpidl.native import library

    out = np.zeros(3, np.float32)
    try:
        packed = mpidl.pack([np.ones(2, np.float32), np.ones(1, np.float32)], out, scale=2.0)
    except (ExtensionError, ArgumentError) as error:
        return {"complaint": str(error)}
    wrong = packed.count != 3 or not (out == 2).all()
    complaint = "packing gives wrong numbers: reinstall mpidl, with a compiler of this machine" if wrong else ""
    return {"complaint": complaint, "instructions": library.instructions()}


def device_memory(world: Communicator) -> Finding:
    """How arrays on a GPU come to MPI; if MPIDL_CUDA_AWARE asks for it, a child of each rank tries the direct way."""
    from mpidl.mpi import cuda_aware

    subject = "GPU arrays"
    complaints = [one for one in everywhere(world, _device_complaint()) if one]
    if complaints:
        return Finding("FAIL" if cuda_aware.VARIABLE in complaints[0] else "ok", subject, complaints[0])
    decision = cuda_aware.decide_now(world.topology, _DEVICE)
    if decision.direct:
        return Finding("ok", subject, f"go to MPI directly ({decision.reasons})")
    staged = f"go to MPI through pinned host memory ({decision.reasons})"
    return Finding("WARN" if f"{cuda_aware.VARIABLE}=1" in decision.reasons else "ok", subject, staged)


def _device_complaint() -> str:
    """Why this rank cannot use a GPU, or empty."""
    from mpidl.arrays import devices
    from mpidl.native import environment

    try:
        environment.CUDA_AWARE.read()
        devices.Memory(devices.named(_DEVICE), 1)
    except (ArgumentError, DeviceError, ExtensionError) as error:
        return str(error)
    return ""


# These need nothing but MPI,
LAUNCH: tuple[Check, ...] = (mpi_library, thread_level, launcher, ranks_per_node)
# and these what training needs, after `load`.
MACHINE: tuple[Check, ...] = (
    threads,
    shared_memory,
    extension,
    device_memory,
    one_sided,
    one_sided_between_nodes,
    speed_in_nodes,
    speed_between_nodes,
)


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} on {count} rank(s)" for name, count in found.items())
