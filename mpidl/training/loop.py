"""The training loop, the same for every algorithm; what it calls around each step is in `strategies` and `metrics`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from mpidl.training.data import Position, Share
from mpidl.training.job import Job
from mpidl.training.metrics import Recorder
from mpidl.training.saving import Saver
from mpidl.training.stop import StopRequest
from mpidl.training.strategies import Strategy


@dataclass(frozen=True)
class Loop:
    """One rank's training."""

    job: Job
    model: torch.nn.Module
    strategy: Strategy
    scheduler: LRScheduler | None
    share: Share
    recorder: Recorder
    saver: Saver
    stop: StopRequest

    def run(self, start: Position, epochs: int) -> Position:
        """Trains from `start` until `epochs` epochs are finished or the ranks agree to stop; returns where that was."""
        self.model.train()
        position, stopping = start, False
        while position.epoch < epochs and not stopping:
            position, stopping = self._epoch(position)
        return position

    def _epoch(self, position: Position) -> tuple[Position, bool]:
        """Trains the rest of an epoch; returns where this rank stands and whether the ranks agreed to stop."""
        optimizer, last, stopping = self.strategy.optimizer, self.share.last_step(position), False
        for batch, count in self.share.epoch(position):
            if self.stop.asked:
                optimizer.request_stop()
            optimizer.zero_grad()
            with self.strategy.weighted(count):
                loss = self.job.loss(self.model, batch)
                torch.autograd.backward(loss)
            optimizer.step()
            self.recorder.add(loss, count)
            stopping = bool(optimizer.stopping)
            position = position.after(count)
            done = position.step == last
            self.recorder.after_step(position.epoch, position.step, last=stopping or done)
            if done:
                break
            if stopping:
                return position, True
            self.saver.after_step(position)
        if self.scheduler is not None:
            self.scheduler.step()
        position = Position(position.epoch + 1)
        self.saver.after_epoch(position)
        return position, stopping
