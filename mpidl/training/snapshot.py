"""What a checkpoint holds of a run under way, as one rank sees it; `saving` says when it is written, by which rank."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

import mpidl
from mpidl.collectives.communicator import Communicator
from mpidl.training.data import Position
from mpidl.training.metrics import Recorder
from mpidl.training.randomness import random_state
from mpidl.training.settings import Settings
from mpidl.training.strategies import Strategy


@dataclass(frozen=True)
class Snapshot:
    """What is saved: one rank's run under strategy."""

    settings: Settings
    identity: Mapping[str, Any]  # settings that a run keeps
    comm: Communicator
    checkpoints: Path
    model: torch.nn.Module
    strategy: Strategy
    scheduler: LRScheduler | None
    recorder: Recorder
    resumed: int  # how often this run has gone on after a stop

    def manifest(self, position: Position, samples: int, clock: int | None = None) -> dict[str, Any]:
        """What the manifest says besides the files."""
        ranks = self.comm.topology
        return {
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {
                "mpidl": mpidl.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "world": {
                "ranks": ranks.size,
                "nodes": list(ranks.placement.nodes),
                "link": ranks.link and ranks.link.as_dict(),
                "arrival": getattr(self.strategy.optimizer, "arrival", None),
            },
            "run": dict(self.identity),
            "position": asdict(position),
            "steps": self.recorder.steps,
            "samples": samples,
            "seconds": self.recorder.seconds,
            "clock": clock,
            "resumed": self.resumed,
        }

    def optimizer(self) -> dict[str, Any]:
        """State of optimiser and scheduler; synchronous: a collective."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        optimizer = self.strategy.optimizer_state()
        return {"optimizer": optimizer, "scheduler": scheduler, "common": self.strategy.common_state()}

    def local(self) -> dict[str, Any]:
        """What this rank alone holds. Buffers (BatchNorm statistics) differ between ranks while they train."""
        return {
            "random": random_state(),
            "buffers": {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()},
            **self.exchanged(),
        }

    def exchanged(self) -> dict[str, Any]:
        """The part of it that an exchange with the others changes."""
        own = self.strategy.own_state()  # first: the statistics count an exchange under way, for which it waits
        statistics = dict(vars(self.strategy.optimizer.statistics))
        return {
            "own": own,
            "statistics": {k: dict(v) if isinstance(v, Mapping) else v for k, v in statistics.items()},
        }
