"""`mpidl doctor`: one line for each thing that training needs of this machine; the checks stand in `checks`."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import click

from mpidl.cli.checks import Finding
from mpidl.errors import NoMPIError

T = TypeVar("T")


@click.command("doctor")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds that the start of MPI, and then the test of one-sided MPI, may take before they count as hanging.",
)
def command(time_limit: float) -> None:
    """Say whether this machine is ready to train: one line for each thing, ok, WARN or FAIL, and what to do.

    Run it as one rank, or as the ranks that are to train. The exit status is 0 if nothing is FAIL, else 1.

    \b
    Example:
      mpidl doctor
      mpidl run -n 4 -- mpidl doctor
    """
    raise SystemExit(_examine(time_limit))


def _examine(time_limit: float) -> int:
    from mpidl.cli import checks

    try:
        world = _limited(time_limit, "starting MPI", checks.start)
    except NoMPIError as error:
        _print(Finding("FAIL", "MPI", str(error)))
        return 1
    failed = False
    for check in checks.CHECKS:
        finding = _limited(time_limit, f"the check {check.__name__}", functools.partial(check, world))
        failed |= finding.level == "FAIL"
        if world.rank == 0:
            _print(finding)
    return int(failed)


def _print(finding: Finding) -> None:
    click.echo(f"{finding.level:<5} {finding.subject}: {finding.text}")


def _limited(seconds: float, what: str, act: Callable[[], T]) -> T:
    """Returns act() if it comes back in time; else says so and ends this process, since a call into MPI that hangs
    cannot be interrupted. The launcher then ends the other ranks."""

    def give_up() -> None:
        text = (
            f"hangs: {what} did not come back within {seconds:g} s. Several nodes: start with srun instead of mpirun, "
            "and see that the ranks can reach each other; then ask the site which network MPI should use"
        )
        os.write(1, f"FAIL  time limit: {text}\n".encode())
        os._exit(1)

    watch = threading.Timer(seconds, give_up)
    watch.daemon = True
    watch.start()
    try:
        return act()
    finally:
        watch.cancel()
