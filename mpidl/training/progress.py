"""What a person sees while a job trains: a bar on a terminal, plain lines in a log. Figures come from `metrics`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Figures:
    """The newest figures of a run."""

    loss: float
    samples_per_second: float
    staleness: float | None = None  # mean so far, asynchronous only

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}  {self.samples_per_second:.0f} samples/s"
        return text if self.staleness is None else f"{text}  staleness {self.staleness:.2f}"


class Progress(Protocol):
    """Something that shows how far a run is."""

    def update(self, epoch: int, step: int, figures: Figures | None) -> None:
        """Shows `step` steps done of epoch `epoch` (from 0); figures are None until the first record."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def new_progress(label: str, epochs: int, steps: int, terminal_columns: int | None) -> Progress:
    """Returns a bar if standard error ends in a terminal, directly or behind mpirun's pipe; else plain lines."""
    if terminal_columns is not None or sys.stderr.isatty():
        return Bar(label, epochs, steps, terminal_columns)
    return Lines(label, epochs, steps)


class Silent:
    """Shows nothing: every rank but the first."""

    def update(self, epoch: int, step: int, figures: Figures | None) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is open."""


class Lines:
    """A line at the end of every epoch, and one every 5 seconds in between."""

    def __init__(self, label: str, epochs: int, steps: int) -> None:
        self._label, self._epochs, self._steps = label, epochs, steps
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def update(self, epoch: int, step: int, figures: Figures | None) -> None:
        if step < self._steps and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        place = f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}"
        print(f"{self._label}: {place}  {figures or ''}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class Bar:
    """One bar over all epochs."""

    def __init__(self, label: str, epochs: int, steps: int, columns: int | None) -> None:
        self._epochs, self._steps = epochs, steps
        console = Console(stderr=True, force_terminal=True, width=columns)
        # No thread of its own: it is drawn from the loop, so that nothing writes while MPI is waited for.
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._rich.add_task(label, total=epochs * steps, figures="")
        self._drawn = 0.0
        self._rich.start()

    def update(self, epoch: int, step: int, figures: Figures | None) -> None:
        done = epoch * self._steps + step
        self._rich.update(self._task, completed=done, figures=str(figures or ""))
        if time.monotonic() - self._drawn > 0.1 or done == self._epochs * self._steps:
            self._drawn = time.monotonic()
            self._rich.refresh()

    def close(self) -> None:
        self._rich.stop()
