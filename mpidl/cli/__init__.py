"""The command line: `main` is the console script, `run_job` what a job file calls when it is run as a program.

One command per file, imported when it is asked for; no command imports torch or starts MPI before it needs to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main", "run_job"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit.

    Args:
        arguments: without the program's name; the process's own if None.
    """
    from mpidl.cli.group import cli  # only now: the launcher beside it is also used without click

    cli(args=None if arguments is None else list(arguments), prog_name="mpidl")


def run_job(file: str) -> None:
    """Train the job in `file` with the process's arguments: `mpirun -n 4 python FILE ...` is `mpidl train FILE ...`.

    Args:
        file: the job's own `__file__`.
    """
    main(["train", file, *sys.argv[1:]])
