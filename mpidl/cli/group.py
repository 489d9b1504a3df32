"""The command `mpidl` itself: its help, and where each command lives. What the commands do stands in their files."""

from __future__ import annotations

import importlib

import click

import mpidl
from mpidl.errors import ArgumentError, LauncherError, NoMPIError

_COMMANDS = {
    "bench": "mpidl.cli.bench.command",
    "doctor": "mpidl.cli.doctor.command",
    "plot": "mpidl.cli.plot",
    "run": "mpidl.cli.launch.run",
    "train": "mpidl.cli.train",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is named; each module calls it `command`.

    Refusals are one sentence on stderr and status 2; every other exception keeps its traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ArgumentError, LauncherError, NoMPIError) as refusal:
            click.echo(f"mpidl: {refusal}", err=True)
            ctx.exit(2)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mpidl.__version__, prog_name="mpidl")
def cli() -> None:
    """Train PyTorch models over MPI: synchronously by allreduce, or through a one-sided parameter server.

    \b
    Example: see that this machine is ready, then train with four ranks.
      mpidl run -n 2 -- mpidl doctor
      mpidl run -n 4 -- mpidl train jobs/digits.py --algorithm agn --output runs/digits
    """
