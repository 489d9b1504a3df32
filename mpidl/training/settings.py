"""What the user of `mpidl train` asked for, as one frozen value; nothing is decided or checked here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

UNSAVED_STATUS = 1  # trained, but the last checkpoint could not be written
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, outputs written, may be run again


@dataclass(frozen=True)
class Settings:
    """One run of one job."""

    job: Path
    output: Path
    algorithm: str = "synchronous"
    epochs: int = 20
    batch_size: int = 16  # samples per rank and step
    communication_window: int = 3  # local steps per exchange, not with `synchronous`
    max_clock_spread: int | None = None  # exchanges that a worker may be ahead of the slowest, asynchronous only
    hyperparameters: tuple[str, ...] = ()  # of the algorithm, each NAME=VALUE
    shard: bool = False  # ranks share weights and optimiser state, synchronous only
    servers: int = 0  # of the last ranks, which then do not train; asynchronous only
    seed: int = 0
    overwrite: bool = False
    resume: bool = False  # go on from the newest whole checkpoint in `output`
    keep: int = 2  # newest checkpoints that stay
    checkpoint_every: float | None = None  # seconds, besides the end of each epoch
    log_every: int = 10  # steps per line of metrics
    job_options: tuple[str, ...] = ()
    command: str = ""  # as the user wrote it, for the summary
    terminal_columns: int | None = None  # of the terminal behind mpirun's pipe; None: ask stderr itself

    @property
    def synchronous(self) -> bool:
        """Whether all ranks take their steps together, so that collectives between steps are allowed."""
        return self.algorithm in ("synchronous", "model-averaging", "diloco")
