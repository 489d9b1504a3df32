"""`mpidl doctor`: one line for each thing that training needs of this machine; the checks stand in `checks`."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from mpidl.cli.doctor.finding import Finding
from mpidl.errors import NoMPIError

if TYPE_CHECKING:
    from mpidl.cli.doctor.checks import Check
    from mpidl.collectives.communicator import Communicator

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
      sbatch jobs/check.sbatch
    """
    raise SystemExit(_examine(time_limit))


def _examine(time_limit: float) -> int:
    from mpidl.cli.doctor import checks, launch_checks
    from mpidl.mpi import runtime

    try:
        warning = launch_checks.foreseen(runtime.mpi_library(), os.environ)
        if warning is not None:
            _print(warning)
        world = _limited(time_limit, "starting MPI", checks.start)
    except NoMPIError as error:
        _print(Finding("FAIL", "MPI", str(error)))
        return 1
    findings = _findings(world, checks.LAUNCH, time_limit)
    if not any(finding.final for finding in findings):
        checks.load(world)
        findings += _findings(world, checks.MACHINE, time_limit)
    return int(any(finding.level == "FAIL" for finding in findings))


def _findings(world: Communicator, wanted: tuple[Check, ...], time_limit: float) -> list[Finding]:
    """Makes the checks one by one, each within the limit, and prints what they find, on one rank."""
    from mpidl.cli.doctor.launch_checks import speaks

    findings: list[Finding] = []
    for check in wanted:
        finding = _limited(time_limit, f"the check {check.__name__}", functools.partial(check, world))
        if finding is None:
            continue
        findings.append(finding)
        if speaks(world):
            _print(finding)
        if finding.final:
            break
    return findings


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
