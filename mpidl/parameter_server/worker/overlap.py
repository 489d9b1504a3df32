"""When commits and pulls may be made beside local steps, by a thread; how, is in `delta` and `distbelief`."""

from __future__ import annotations

from mpidl.errors import ArgumentError
from mpidl.mpi import runtime


def check(overlap: int, period: str, steps: int, max_clock_spread: int | None) -> None:
    """Refuses what cannot be.

    Args:
        overlap: local steps beside which an exchange is under way; 0: none.
        period: the name of what it may not exceed,
        steps: and its value.
        max_clock_spread: see `Worker`.

    Raises:
        ArgumentError: see above.
    """
    if not overlap:
        return
    if overlap > steps:
        raise ArgumentError(f"overlap={overlap}; expected at most {period}, which is {steps}")
    if max_clock_spread is not None:
        raise ArgumentError(
            f"overlap={overlap} and max_clock_spread={max_clock_spread}: one lets a worker wait for nothing, and the "
            "other for the slowest worker: leave one"
        )
    level = runtime.mpi_description()["thread_level"]
    if level != "multiple":
        raise ArgumentError(
            f"overlap={overlap} needs an MPI with thread level multiple; found {level!r}: import mpidl before "
            "mpi4py.MPI, or use an MPI with threads"
        )
