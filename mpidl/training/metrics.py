"""Metrics and progress of one rank while it trains: counts batches, and every few steps writes what they came to.

With an asynchronous algorithm nothing here is a collective; with a synchronous one a record is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from mpidl.training.outputs import MetricsFile
from mpidl.training.progress import Figures, Progress
from mpidl.training.strategies import Strategy, Tally


@dataclass(frozen=True)
class Done:
    """What one rank did before its run was stopped."""

    steps: int
    samples: int
    seconds: float


NOTHING = Done(0, 0, 0.0)


class Recorder:
    """Sums up this rank's batches and records them.

    Args:
        strategy: makes the figures.
        metrics: where records go; None on a rank that writes none.
        progress: what is shown.
        every: steps per record; the same on all ranks.
        before: what this rank did before the run was stopped, if it goes on.
    """

    def __init__(
        self, strategy: Strategy, metrics: MetricsFile | None, progress: Progress, every: int, before: Done = NOTHING
    ) -> None:
        self._strategy, self._metrics, self._progress, self._every = strategy, metrics, progress, every
        self._losses: list[tuple[torch.Tensor, int]] = []
        self._before = before
        self._since = self._started = time.monotonic()
        self._figures: Figures | None = None
        self.samples = before.samples  # of this rank, in all
        self.steps = before.steps
        self.just_recorded = False  # after the last step

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a stop included."""
        return time.monotonic() - self._started

    def start(self) -> None:
        """Opens the metrics and starts the clock; to be called when training begins."""
        if self._metrics is not None:
            self._metrics.open()
        self._since = time.monotonic()
        self._started = self._since - self._before.seconds

    def add(self, loss: torch.Tensor, count: int) -> None:
        """Takes in one batch; the loss is not looked at yet, since on a GPU that would wait for it."""
        self._losses.append((loss.detach(), count))
        self.samples += count
        self.steps += 1

    def after_step(self, epoch: int, step: int, *, last: bool) -> None:
        """Records after every few steps and after an epoch's last one; shows progress after each.

        Args:
            epoch: from 0.
            step: steps done in this epoch.
            last: whether no more steps follow in this epoch, on all ranks in the synchronous strategy.
        """
        self.just_recorded = last or step % self._every == 0
        if self.just_recorded:
            self._record(epoch)
        self._progress.update(epoch, step, self._figures)

    def close(self) -> None:
        """Ends progress and metrics."""
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    def _record(self, epoch: int) -> None:
        now = time.monotonic()
        tally = Tally(
            loss=sum(float(loss) * count for loss, count in self._losses),
            samples=sum(count for _, count in self._losses),
            seconds=now - self._since,
        )
        self._losses, self._since = [], now
        figures: dict[str, Any] = self._strategy.record(tally)
        place = {"epoch": epoch + 1, "step": self.steps, "seconds": now - self._started}
        self._figures = Figures(figures["loss"], figures["samples_per_second"], figures.get("mean_staleness"))
        if self._metrics is not None:
            self._metrics.write({**place, **figures})
