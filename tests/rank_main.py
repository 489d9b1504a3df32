"""One rank of a test launch: sends its output and stacks to files of its own, then runs pytest. bed.py starts it.

It runs before anything else is imported, so that a failing import is in the log too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from bed import DUMP_SIGNAL, FOLDER

# Which of them exists depends on the launcher; MPI itself is not started here.
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_exit = os._exit


def main() -> int:
    folder = Path(os.environ[FOLDER])
    rank = next(os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    os.environ["MPIDL_TESTS_RANK"] = rank
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)  # a segmentation fault in C names the Python line
    faulthandler.register(DUMP_SIGNAL, stacks, all_threads=True)
    # The parent stops a launch that hangs; should the parent itself be gone, the ranks end by themselves.
    limit = float(os.environ["MPIDL_TESTS_LIMIT"])
    faulthandler.dump_traceback_later(limit + 30, exit=True, file=stacks)
    # Open MPI ends the victims of an Abort with SIGTERM: they go at once and are no culprits of their own. mpidl puts
    # its handler only where there is none.
    signal.signal(signal.SIGTERM, lambda *_: _victim(folder / f"{rank}.jsonl"))
    _name_who_leaves(folder / f"{rank}.failure")
    (folder / f"{rank}.pid").write_text(str(os.getpid()))

    import pytest

    # pytest's own faulthandler plugin would take the handlers over; four ranks would fight over one cache.
    status = pytest.main(["-q", "--tb=short", "-p", "no:faulthandler", "-p", "no:cacheprovider", *sys.argv[1:]])
    # mpi/conftest.py has ended the job if there was no test at all; that --inside selected none here is no failure.
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)


def _victim(notes: Path) -> None:
    with notes.open("a") as stream:
        stream.write(json.dumps({"exit": 128 + signal.SIGTERM}) + "\n")
    _exit(128 + signal.SIGTERM)


def _name_who_leaves(report: Path) -> None:
    """Makes a rank that calls os._exit say so: MPICH kills the others at once, and all would look alike.

    A forked child (a DataLoader's worker) always leaves that way, and is no rank.
    """
    rank_process = os.getpid()

    def leave(status: int) -> NoReturn:
        if os.getpid() == rank_process:
            report.write_text(f"os._exit({status}) was called:\n{''.join(traceback.format_stack())}")
        _exit(status)

    os._exit = leave


if __name__ == "__main__":
    sys.exit(main())
