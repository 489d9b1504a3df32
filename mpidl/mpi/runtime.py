"""Starts MPI once per process: thread level, exit protocol, threads per rank.

Communicators are made in `topology`; what happens when a rank leaves stands in `exit_protocol`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from typing import Any

from mpidl.errors import ForkedError, NoMPIError
from mpidl.mpi import exit_protocol
from mpidl.mpi.exit_protocol import on_stop_signal

__all__ = [
    "cores",
    "mpi",
    "mpi_description",
    "mpi_library",
    "on_stop_signal",
    "refuse_forked",
    "set_torch_threads",
    "started",
    "torch_threads",
]

_mpi: Any = None
_pid = 0
_threads: int | None = None


def started() -> bool:
    """Returns whether this process has started MPI through mpidl."""
    return _mpi is not None


def mpi() -> Any:
    """Returns the module `mpi4py.MPI`, initialised; the first call starts MPI and installs the exit protocol.

    Raises:
        ForkedError: the process is a child made by fork or by multiprocessing and has no part in MPI.
        NoMPIError: no MPI library can be loaded.
    """
    if _mpi is None:
        return _start()
    refuse_forked()
    return _mpi


def refuse_forked() -> None:
    """Refuses a forked child, which shares memory with the other ranks and would take part in its parent's name.

    Raises:
        ForkedError: the process was forked from one that has started MPI.
    """
    if _pid and os.getpid() != _pid:
        raise ForkedError(f"process {os.getpid()} was forked from rank process {_pid}: only the parent may use mpidl")


def _start() -> Any:
    global _mpi, _pid
    if multiprocessing.parent_process() is not None:
        raise ForkedError("a child process of multiprocessing has no rank: use mpidl in its parent only")
    module = _load()
    if not module.Is_initialized():
        module.Init_thread(module.THREAD_MULTIPLE)
    world = module.COMM_WORLD
    _wrap_finalize(module)
    exit_protocol.install(f"rank {world.rank} of {world.size}", world.Abort)
    _mpi, _pid = module, os.getpid()
    return _mpi


def _load() -> Any:
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize = False  # MPI starts here, at the thread level asked for here,
            mpi4py.rc.finalize = True  # and still ends with the interpreter, after every atexit handler
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise NoMPIError(
            f"no MPI library could be loaded ({str(error).strip().splitlines()[0]}): load your site's MPI module, "
            "or install one with: pip install 'mpidl[mpich]'"
        ) from error
    return MPI


def _wrap_finalize(module: Any) -> None:
    """A program that ends MPI itself leaves then: the others must hear of it before they wait in vain."""
    finalize = module.Finalize

    def leave() -> None:
        exit_protocol.leave_quietly()
        finalize()

    module.Finalize = leave


def mpi_library() -> str:
    """Returns the name of the MPI library that this process would run on, without starting it.

    Raises:
        NoMPIError: no MPI library can be loaded.
    """
    return _library(_load().Get_library_version())


def _library(text: str) -> str:
    first = text.strip("\0 \n").splitlines()[0]
    return next((name for name in ("Open MPI", "MPICH", "Intel(R) MPI", "MVAPICH") if name in text), first)


def mpi_description() -> dict[str, str]:
    """Returns what MPI this process runs on: keys library, version, standard, thread_level."""
    module = mpi()
    text = module.Get_library_version().strip("\0 \n")
    number = re.search(r"\d+\.\d+[\w.]*", text)
    levels = {
        module.THREAD_SINGLE: "single",
        module.THREAD_FUNNELED: "funneled",
        module.THREAD_SERIALIZED: "serialized",
        module.THREAD_MULTIPLE: "multiple",
    }
    return {
        "library": _library(text),
        "version": number.group(0) if number else "unknown",
        "standard": ".".join(str(part) for part in module.Get_version()),
        "thread_level": levels[module.Query_thread()],
    }


def cores() -> frozenset[int]:
    """Returns the cores in this process's affinity mask."""
    return frozenset(os.sched_getaffinity(0))


def set_torch_threads(sharing: int) -> None:
    """Gives torch its fair part of this rank's cores, unless the user chose by OMP_NUM_THREADS.

    Args:
        sharing: how many ranks of this node, this one included, run on the same cores.
    """
    global _threads
    if "OMP_NUM_THREADS" in os.environ:
        return
    _threads = max(1, len(cores()) // sharing)
    torch = sys.modules.get("torch")
    if torch is None:
        os.environ["OMP_NUM_THREADS"] = str(_threads)  # read by torch when it is imported
    else:
        torch.set_num_threads(_threads)


def torch_threads() -> int | None:
    """Returns the number of threads that mpidl gave to torch, or None where the user's choice stands."""
    return _threads
