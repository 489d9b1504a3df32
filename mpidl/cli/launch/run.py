"""`mpidl run`: start N ranks of a program, pass on what the user asks of them, end with the job's status.

Neither torch nor MPI is imported here. How the ranks are started is decided in `mpidl.cli.launch.launcher`; what a
signal does to the running job stands in `mpidl.cli.launch.supervisor`.
"""

from __future__ import annotations

import os
import shlex
import sys

import click

from mpidl.cli.launch.launcher import Launch, plan
from mpidl.cli.launch.supervisor import supervise
from mpidl.native import environment


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-n", "--ranks", type=click.IntRange(min=1), required=True, help="How many ranks to start.")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def command(ranks: int, program: tuple[str, ...]) -> None:
    """Start N ranks of PROGRAM with the mpirun of this environment, or srun inside a SLURM allocation.

    It says in one line what it runs, sets what root or more ranks than cores need, and ends with the job's status.
    The first Ctrl-C asks the ranks to stop after their step (SIGUSR1): mpidl train then writes its checkpoint and
    ends with status 75. The second Ctrl-C, or SIGTERM, ends the job at once.

    \b
    Example:
      mpidl run -n 4 -- mpidl train jobs/digits.py --algorithm downpour
      mpidl run -n 2 -- python train.py --lr 0.1
    """
    launch = plan(ranks, program)
    click.echo(_line(launch), err=True)
    environ = {**os.environ, **launch.environment}
    if sys.stderr.isatty():
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # some terminals do not know
        environ.setdefault(environment.TERMINAL.name, str(columns))
    raise SystemExit(supervise(launch.argv, environ))


def _line(launch: Launch) -> str:
    added = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items() if name != "PATH"]
    return "mpidl run: " + " ".join([*added, shlex.join(launch.argv)])
