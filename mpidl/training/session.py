"""One run of `mpidl train`, in order: refuse or prepare, train, finish, save, evaluate, summarise."""

from __future__ import annotations

import platform
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import mpidl
from mpidl import runtime
from mpidl.communicator import Communicator
from mpidl.training import job as jobs
from mpidl.training.agreement import everywhere, workers
from mpidl.training.data import Share, first_batch, training_share
from mpidl.training.evaluation import HeldOut, evaluate
from mpidl.training.job import Job
from mpidl.training.loop import Loop, Progressed
from mpidl.training.outputs import Folder
from mpidl.training.progress import Silent, new_progress
from mpidl.training.recording import Recorder
from mpidl.training.settings import STOPPED_STATUS, Settings
from mpidl.training.stop import StopRequest
from mpidl.training.ways import Way, new_way


@dataclass(frozen=True)
class Prepared:
    """What every rank holds when nothing speaks against training."""

    job: Job
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train: Any
    held_out: Any


def run(settings: Settings, stop: StopRequest) -> int:
    """Trains the job as the settings say and writes its outputs; a collective over all ranks, the last may only serve.

    Returns:
        The exit status: 0, or 75 if the run was stopped on request.

    Raises:
        RefusedError: something was wrong before training; the same on every rank.
        HelpAskedError: the job's own options were asked for.
    """
    comm = workers(settings)
    job = everywhere(comm, lambda: jobs.load(settings.job, settings.job_options))
    prepared = everywhere(comm, lambda: _prepare(settings, job))
    folder = Folder(settings.output)
    everywhere(comm, lambda: folder.prepare(settings.overwrite) if comm.rank == 0 else None)
    way = new_way(settings, prepared.optimizer, prepared.model, comm)
    _seed(settings.seed + comm.rank)  # from here on: dropout, augmentation
    return _Run(settings, comm, prepared, folder, way).train(stop)


def _prepare(settings: Settings, job: Job) -> Prepared:
    """Makes the job's objects and tries its functions once; no collective."""
    _seed(settings.seed)
    train, held_out = job.dataset(True), job.dataset(False)
    _seed(settings.seed)  # so that the model does not depend on how the data were made
    model = job.new_model()
    job.try_batches(model, first_batch(train, settings.batch_size), first_batch(held_out, settings.batch_size))
    return Prepared(job, model, job.new_optimizer(model.parameters()), train, held_out)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class _Run:
    """A run that is under way on this rank."""

    def __init__(self, settings: Settings, comm: Communicator, prepared: Prepared, folder: Folder, way: Way) -> None:
        self._settings, self._comm, self._prepared = settings, comm, prepared
        self._folder, self._way = folder, way
        self._share: Share = training_share(prepared.train, comm.rank, comm.size, settings.batch_size, settings.seed)

    def train(self, stop: StopRequest) -> int:
        recorder = self._new_recorder()
        started = time.monotonic()
        prepared = self._prepared
        loop = Loop(prepared.job, prepared.model, self._way, self._share, recorder, stop)
        progressed = loop.run(self._settings.epochs, self._end_of_epoch)
        self._way.optimizer.finish()
        seconds = time.monotonic() - started
        recorder.close()
        progressed = self._agreed(progressed)
        self._conclude(progressed, recorder, seconds)
        return STOPPED_STATUS if progressed.stopped else 0

    def _agreed(self, progressed: Progressed) -> Progressed:
        """What the ranks did together: a worker may have ended its last epoch before another was asked to stop."""
        mine = np.array([progressed.epochs, not progressed.stopped], np.int64)
        epochs, none_stopped = self._comm.allreduce(mine, op="min")
        return Progressed(int(epochs), stopped=not none_stopped)

    def _conclude(self, progressed: Progressed, recorder: Recorder, seconds: float) -> None:
        """Saves first and evaluates then: who was asked to stop may not have long."""
        self._save(progressed.epochs, dict(self._prepared.model.state_dict()))
        summary = self._summary(progressed, recorder, seconds)
        if progressed.stopped and self._comm.rank == 0:
            self._folder.write_summary(summary)
        prepared, size = self._prepared, self._settings.batch_size
        held_out = evaluate(prepared.job, prepared.model, prepared.held_out, self._comm, size)
        if self._comm.rank == 0:
            self._folder.write_summary({**summary, **_figures(held_out)})
        self._comm.barrier()  # Open MPI ends the job when the first rank exits with a status: the summary comes first

    def _new_recorder(self) -> Recorder:
        settings, rank = self._settings, self._comm.rank
        label = f"{settings.job.stem} {settings.algorithm} x{self._comm.size}"
        progress = (
            new_progress(label, settings.epochs, self._share.steps, settings.terminal_columns)
            if rank == 0
            else Silent()
        )
        writes = rank == 0 or not settings.synchronous
        metrics = self._folder.metrics(None if settings.synchronous else rank) if writes else None
        return Recorder(self._way, metrics, progress, settings.log_every)

    def _end_of_epoch(self, epochs: int) -> None:
        if self._comm.rank == 0:
            self._save(epochs, self._way.model_state())

    def _save(self, epochs: int, state: dict[str, torch.Tensor]) -> None:
        if self._comm.rank != 0:
            return
        self._folder.write_checkpoint(
            {
                "model": state,
                "optimizer": self._way.optimizer.state_dict(),
                "algorithm": self._settings.algorithm,
                "epochs": epochs,
                "ranks": self._comm.size,
                "seed": self._settings.seed,
                "mpidl": mpidl.__version__,
            }
        )

    def _summary(self, progressed: Progressed, recorder: Recorder, seconds: float) -> dict[str, Any]:
        """What is known before the evaluation; a collective."""
        samples = int(self._comm.allreduce(np.array([recorder.samples], np.int64))[0])
        wall = float(self._comm.allreduce(np.array([seconds]), op="max")[0])
        settings = self._settings
        return {
            "job": str(settings.job),
            "algorithm": settings.algorithm,
            "stopped": progressed.stopped,
            "held_out_loss": None,
            "held_out_accuracy": None,
            "held_out_samples": None,
            "wall_seconds": wall,
            "samples": samples,
            "samples_per_second": samples / wall,
            "epochs": settings.epochs,
            "epochs_finished": progressed.epochs,
            "steps": recorder.steps,
            "batch_size": settings.batch_size,
            "communication_window": None if settings.synchronous else settings.communication_window,
            "seed": settings.seed,
            "options": {name: _plain(value) for name, value in self._prepared.job.options.items()},
            **self._way.totals(),
            "ranks": self._comm.size,
            "servers": self._comm.servers,
            "nodes": self._comm.nodes,
            "threads_per_rank": torch.get_num_threads(),
            "mpi": runtime.mpi_description(),
            "versions": {
                "mpidl": mpidl.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "command": settings.command,
        }


def _figures(held_out: HeldOut) -> dict[str, Any]:
    return {
        "held_out_loss": held_out.loss,
        "held_out_accuracy": held_out.accuracy,
        "held_out_samples": held_out.samples,
    }


def _plain(value: object) -> object:
    """A value as JSON has it; what JSON has no form for, as text."""
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)
