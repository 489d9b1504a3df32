"""The training loop, one for both ways; what it calls around each step stands in `ways` and `recording`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpidl.training.data import Share
from mpidl.training.job import Job
from mpidl.training.recording import Recorder
from mpidl.training.stop import StopRequest
from mpidl.training.ways import Way


@dataclass(frozen=True)
class Progressed:
    """How far the loop came."""

    epochs: int  # finished
    stopped: bool  # the ranks agreed to stop on request


@dataclass(frozen=True)
class Loop:
    """What trains on this rank."""

    job: Job
    model: torch.nn.Module
    way: Way
    share: Share
    recorder: Recorder
    stop: StopRequest

    def run(self, epochs: int, end_of_epoch: Callable[[int], None]) -> Progressed:
        """Trains `epochs` epochs, or until the ranks agree to stop.

        Args:
            end_of_epoch: called with the number of finished epochs; makes no collective.
        """
        self.model.train()
        for epoch in range(epochs):
            if self._epoch(epoch):
                return Progressed(epoch, stopped=True)
            end_of_epoch(epoch + 1)
        return Progressed(epochs, stopped=False)

    def _epoch(self, epoch: int) -> bool:
        """Trains one epoch; returns whether the ranks agreed to stop within it."""
        optimizer = self.way.optimizer
        for step, (batch, count) in enumerate(self.share.epoch(epoch), start=1):
            if self.stop.asked:
                optimizer.request_stop()
            optimizer.zero_grad()
            with self.way.weighted(count):
                loss = self.job.loss(self.model, batch)
                torch.autograd.backward(loss)
            optimizer.step()
            self.recorder.add(loss, count)
            stopping = bool(optimizer.stopping)
            self.recorder.after_step(epoch, step, last=stopping or step == self.share.steps)
            if stopping:
                return True
        return False
