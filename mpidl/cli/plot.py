"""`mpidl plot`: its arguments; the picture is drawn in `mpidl.training.plotting`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("plot")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs.png"),
    show_default=True,
    help="The picture; .png, .svg or .pdf. An earlier one is replaced.",
)
def command(runs: tuple[Path, ...], output: Path) -> None:
    """Draw the output folders of one or more runs of `mpidl train` into one picture.

    Loss against time and against samples, the accuracy that each run ended with, the histogram of staleness and the
    share of time in communication. A run that is still under way is drawn as far as it has come. Needs matplotlib:
    pip install 'mpidl[plot]'.

    \b
    Example:
      mpidl plot runs/synchronous runs/agn --output both.png
    """
    from mpidl.training import plotting

    plotting.draw([plotting.read(run) for run in runs], output)
    click.echo(f"mpidl plot: {len(runs)} run(s) drawn into {output}")
