"""What a person sees while a benchmark runs: a bar on a terminal, a line for each case in a log."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class Progress(Protocol):
    """Something that shows how far a run is."""

    def begin(self, case: str) -> None:
        """Shows which case is being measured."""

    def done(self) -> None:
        """Counts it."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def new_progress(label: str, cases: int, terminal_columns: int | None, *, silent: bool) -> Progress:
    """Returns a bar if standard error ends in a terminal, directly or behind mpirun's pipe; else plain lines.

    Args:
        label: what runs.
        cases: how many there will be.
        terminal_columns: of the terminal behind mpirun's pipe; None: ask standard error itself.
        silent: on every rank but the first.
    """
    if silent:
        return Silent()
    if terminal_columns is not None or sys.stderr.isatty():
        return Bar(label, cases, terminal_columns)
    return Lines(label, cases)


class Silent:
    """Shows nothing."""

    def begin(self, case: str) -> None:
        """Nothing is shown."""

    def done(self) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is open."""


class Lines:
    """A line when a case has ended."""

    def __init__(self, label: str, cases: int) -> None:
        self._label, self._cases, self._number = label, cases, 0
        self._case, self._began = "", 0.0

    def begin(self, case: str) -> None:
        self._number += 1
        self._case, self._began = case, time.monotonic()

    def done(self) -> None:
        seconds = time.monotonic() - self._began
        print(
            f"{self._label}: {self._number}/{self._cases}  {self._case}  {seconds:.1f} s", file=sys.stderr, flush=True
        )

    def close(self) -> None:
        """Nothing is open."""


class Bar:
    """One bar over all cases; drawn between cases only, so that nothing falls into somebody's turn."""

    def __init__(self, label: str, cases: int, columns: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True, force_terminal=True, width=columns)
        columns_shown = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[case]}"),
        )
        self._rich = RichProgress(
            *columns_shown, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._rich.add_task(label, total=cases, case="")
        self._rich.start()

    def begin(self, case: str) -> None:
        self._rich.update(self._task, case=case, refresh=True)

    def done(self) -> None:
        self._rich.update(self._task, advance=1, refresh=True)

    def close(self) -> None:
        self._rich.stop()
