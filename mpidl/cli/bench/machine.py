"""Where and on what is measured: a core for each rank, hardware, versions, and what else the machine does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from mpidl.mpi import runtime

# Each launcher's word for a rank's place on its node, read before MPI starts.
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_RANKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOOK = 0.5  # seconds in which the machine is watched while no rank works
BUSY = 0.15  # cores' worth of other people's work from which a figure is doubtful


def pin() -> int:
    """Keeps this process, and all threads that it will start, on one core, with one thread for computing.

    Called before MPI and torch start threads. Ranks of one node take one core each, in the order of their ranks; where
    there are more of them than cores, they share.

    Returns:
        The core.
    """
    cores = sorted(os.sched_getaffinity(0))
    place = next((int(os.environ[name]) for name in _LOCAL_RANK if os.environ.get(name, "").isdigit()), 0)
    core = cores[place % len(cores)]
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    return core


def launched_ranks() -> int:
    """Returns how many ranks the launcher says that it started; 1 without one. MPI is not needed for it."""
    return max((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), default=1)


def hardware() -> dict[str, Any]:
    """Returns what is known of this machine without asking anybody who may know its name."""
    fields = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE))
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    wide = [name for name in ("avx512f", "avx2", "f16c") if name in fields.get("flags", "").split()]
    return {
        "processor": fields.get("model name", platform.machine()),
        "family": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "instructions": wide,
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "kernel": platform.release().partition("-")[0],
    }


def versions() -> dict[str, str]:
    """Returns the versions of what takes part. gloo has none of its own: it is a part of torch."""
    import numpy as np
    import torch

    import mpidl

    found = {"mpidl": mpidl.__version__, "python": platform.python_version(), "numpy": np.__version__}
    found["torch"] = f"{torch.__version__} ({str(torch.version.git_version)[:12]})"
    has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    found["gloo"] = f"the one inside torch {torch.__version__}" if has_gloo else "none"
    if importlib.util.find_spec("horovod") is not None:
        found["horovod"] = importlib.metadata.version("horovod")
    if runtime.started():
        mpi = runtime.mpi_description()
        found["mpi"] = f"{mpi['library']} {mpi['version']}"
        found["mpi4py"] = importlib.metadata.version("mpi4py")
        found["thread_level"] = mpi["thread_level"]
    return found


def load() -> dict[str, float]:
    """Watches the machine for a moment; all ranks call this at once and sleep in it, so that only others work.

    Returns:
        busy_cores: cores' worth of work that was going on; load_1min: the kernel's average, which remembers.
    """
    before = _ticks()
    started = time.monotonic()
    time.sleep(_LOOK)
    busy = (_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)
    return {"busy_cores": round(busy, 2), "load_1min": round(os.getloadavg()[0], 2)}


def preemptions() -> int:
    """Returns how often this process has lost its core to another one so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _ticks() -> float:
    """Ticks of all cores together in which they worked, stolen ones included."""
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in _text("/proc/stat").split()[1:9])
    return user + nice + system + irq + softirq + steal


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _text(index / "level").strip(), _text(index / "type").strip()
        if kind != "Instruction":
            found[f"L{level}"] = _text(index / "size").strip()
    return found


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
