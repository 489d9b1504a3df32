"""`mpidl bench`: its commands, what their arguments are and what their exit status says; see `mpidl.cli.bench`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mpidl.native import environment

_OPTIONS = (
    click.option("--quick", is_flag=True, help="A few rounds of small cases: shows that everything works, no figure."),
    click.option("--rounds", type=click.IntRange(min=1), help="Rounds to measure.  [default: 21, and 3 with --quick]"),
    click.option(
        "--output",
        type=click.Path(path_type=Path),
        default=Path("runs/bench"),
        show_default=True,
        help="Folder for the results.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an earlier result of the same name in --output."),
)


@click.group("bench")
def command() -> None:
    """Measure mpidl against memcpy, MPI itself and torch, on this machine.

    Contenders take turns in one process, each rank on a core of its own with one thread. Results are checked in the
    same run: a wrong one is a failure and has no figure. --output receives NAME.jsonl with every round, hardware and
    versions, NAME.md with tables and the targets, and NAME.png if matplotlib is there (pip install 'mpidl[plot]').
    A target is met, missed, or undecided where the bootstrap quartiles of the figure lie on both sides of it.

    \b
    Example:
      mpidl bench pack
      mpidl run -n 2 -- mpidl bench allreduce --output results
      mpidl bench report results/allreduce-*.jsonl --output results

    \b
    Exit status of each:
      0   measured, whether or not the targets were met
      1   some contender gave a wrong result
      2   refused; one sentence says why
    """


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _measure(benchmark: str, options: dict[str, Any]) -> None:
    from mpidl.cli.bench import session

    settings = session.Settings(
        benchmark=benchmark,
        command=_command(benchmark, **options),
        terminal_columns=environment.TERMINAL.read(),
        **options,
    )
    raise SystemExit(session.run(settings))


def _command(benchmark: str, quick: bool, rounds: int | None, output: Path, overwrite: bool) -> str:
    """Returns what does the same again, however this was started."""
    flags = ["--quick"] * quick + (["--rounds", str(rounds)] if rounds is not None else [])
    return shlex.join(["mpidl", "bench", benchmark, *flags, "--output", str(output), *["--overwrite"] * overwrite])


@command.command("import")
@_with_options
def import_(**options: Any) -> None:
    """The start of Python with `import mpidl` and without; one process, which starts others.

    \b
    Example:
      mpidl bench import
    """
    _measure("import", options)


@command.command("pack")
@_with_options
def pack(**options: Any) -> None:
    """Many tensors into one buffer and back, against memcpy and torch's flatten, cat and foreach; one process.

    \b
    Example:
      mpidl bench pack --quick
    """
    _measure("pack", options)


@command.command("allreduce")
@_with_options
def allreduce(**options: Any) -> None:
    """Sums over all ranks, 4 KiB to 256 MiB, in place and not, against MPI_Allreduce, gloo and memcpy.

    \b
    Example:
      mpidl run -n 2 -- mpidl bench allreduce
    """
    _measure("allreduce", options)


@command.command("training")
@_with_options
def training(**options: Any) -> None:
    """Steps of a ResNet-18 and a small MLP, against torch DDP over gloo and trainers that do not communicate.

    Horovod takes part if it can be imported.

    \b
    Example:
      mpidl run -n 2 -- mpidl bench training
    """
    _measure("training", options)


@command.command("parameter-server")
@_with_options
def parameter_server(**options: Any) -> None:
    """Commits and pulls of 25 M floats by 1, 2, ... workers, against scale + MPI_Accumulate + MPI_Get.

    There is a case for each number of workers up to the number of ranks.

    \b
    Example:
      mpidl run -n 4 -- mpidl bench parameter-server
    """
    _measure("parameter-server", options)


@command.command("report")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/bench"),
    show_default=True,
    help="Folder for BENCHMARK.md and BENCHMARK.png, which are replaced.",
)
def report(files: tuple[Path, ...], output: Path) -> None:
    """Merge runs of one benchmark, such as one on each MPI, into one page and one picture.

    Targets against the faster of two MPIs need both runs.

    \b
    Example:
      mpidl bench report results/allreduce-mpich-2.jsonl results/allreduce-openmpi-2.jsonl --output results
    """
    from mpidl.cli.bench import session

    session.merge(files, output)
