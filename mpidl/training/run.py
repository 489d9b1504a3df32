"""One run of `mpidl train`, in order: refuse or prepare, train, finish, save, evaluate, summarise."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import mpidl
from mpidl.collectives.communicator import Communicator
from mpidl.mpi import runtime
from mpidl.training import algorithms, resuming
from mpidl.training import job as jobs
from mpidl.training.checkpoint import Store, check_encodable
from mpidl.training.data import Position, Share, first_batch, training_share
from mpidl.training.evaluation import HeldOut, evaluate
from mpidl.training.job import Job
from mpidl.training.loop import Loop
from mpidl.training.metrics import NOTHING, Recorder
from mpidl.training.outputs import CHECKPOINTS, Folder
from mpidl.training.progress import Silent, new_progress
from mpidl.training.randomness import seed_all
from mpidl.training.refusal import RefusedError, everywhere, workers
from mpidl.training.resuming import Origin
from mpidl.training.saving import AsynchronousSaver, Saver, SynchronousSaver, worker_folder
from mpidl.training.settings import STOPPED_STATUS, UNSAVED_STATUS, Settings
from mpidl.training.snapshot import Snapshot
from mpidl.training.stop import StopRequest
from mpidl.training.strategies import Strategy, new_strategy

_EVALUATION_OF_A_STOPPED_RUN = 10.0  # seconds at most: a run that was asked to stop may be killed soon


@dataclass(frozen=True)
class Prepared:
    """What every rank holds when nothing speaks against training."""

    job: Job
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train: Any
    held_out: Any


@dataclass(frozen=True)
class Progressed:
    """What the ranks did together."""

    epochs: int  # finished
    stopped: bool  # they agreed to stop on request
    saved: bool  # the last checkpoint is written


def run(settings: Settings, stop: StopRequest, comm: Communicator | None = None) -> int:
    """Trains the job as the settings say and writes its outputs; a collective over all ranks, dedicated servers too.

    Args:
        settings: what the user asked for.
        stop: becomes set when this rank is asked to stop.
        comm: the ranks that train; default `mpidl.world()`.

    Returns:
        The exit status: 0, 75 if the run was stopped on request, or 1 if its last checkpoint could not be written.

    Raises:
        RefusedError: something was wrong before training; the same on every rank.
        HelpAskedError: the job's own options were asked for.
    """
    comm = comm if comm is not None else workers(settings)
    job = everywhere(comm, lambda: jobs.load(settings.job, settings.job_options))
    prepared = everywhere(comm, lambda: _prepare(settings, job))
    kept = everywhere(comm, lambda: resuming.identity(settings, job.options, len(prepared.train)))
    folder = Folder(settings.output)
    origin = resuming.choose(comm, folder, settings, kept)
    if origin is not None:
        everywhere(comm, lambda: resuming.load_model(origin, prepared.model))
        resuming.reuse_link(origin, comm)
    strategy = new_strategy(settings, prepared.optimizer, prepared.model, comm)
    return _Run(settings, comm, prepared, folder, strategy, kept, origin).train(stop)


def _prepare(settings: Settings, job: Job) -> Prepared:
    """Makes the job's objects and tries its functions once; no collective."""
    seed_all(settings.seed)
    train, held_out = job.dataset(True), job.dataset(False)
    seed_all(settings.seed)  # so that the model does not depend on how the data were made
    model = job.new_model()
    job.try_batches(model, first_batch(train, settings.batch_size), first_batch(held_out, settings.batch_size))
    if job.scheduler is not None:
        tried = job.new_scheduler(job.new_optimizer(model.parameters()))  # over an optimiser of its own
        check_encodable(f"what scheduler(optimizer) of {job.file} returned", tried.state_dict() if tried else {})
    return Prepared(job, model, job.new_optimizer(model.parameters()), train, held_out)


@dataclass
class _Run:
    """A run that is under way on this rank."""

    settings: Settings
    comm: Communicator
    prepared: Prepared
    folder: Folder
    strategy: Strategy
    kept: dict[str, Any]  # settings that a run keeps when it goes on
    origin: Origin | None  # where it goes on from

    def __post_init__(self) -> None:
        settings, comm, prepared, origin = self.settings, self.comm, self.prepared, self.origin
        self._share: Share = training_share(prepared.train, comm.rank, comm.size, settings.batch_size, settings.seed)
        self._recorder = self._new_recorder()
        self._snapshot = Snapshot(
            settings=settings,
            identity=self.kept,
            comm=comm,
            checkpoints=self.folder.checkpoints,
            model=prepared.model,
            strategy=self.strategy,
            scheduler=prepared.job.new_scheduler(self.strategy.optimizer),
            recorder=self._recorder,
            resumed=origin.resumed if origin is not None else 0,
        )

    def train(self, stop: StopRequest) -> int:
        prepared, start = self.prepared, Position()
        seed_all(self.settings.seed + self.comm.rank)  # from here on: dropout, augmentation
        if self.origin is not None:
            start = self.origin.position
            self._restore(self.origin)
        saver = self._new_saver()
        self._recorder.start()
        loop = Loop(
            prepared.job,
            prepared.model,
            self.strategy,
            self._snapshot.scheduler,
            self._share,
            self._recorder,
            saver,
            stop,
        )
        position = loop.run(start, self.settings.epochs)
        saver.before_finish(position)
        self.strategy.optimizer.finish()
        seconds = self._recorder.seconds
        saver.after_finish(position)
        self._recorder.close()
        progressed = self._agreed(position, saver)
        self._conclude(progressed, seconds)
        if not progressed.saved:
            return UNSAVED_STATUS
        return STOPPED_STATUS if progressed.stopped else 0

    def _restore(self, origin: Origin) -> None:
        try:
            resuming.restore(origin, self._snapshot)
        except RefusedError:  # on all ranks alike: so all can close what is open, and leave quietly
            self._recorder.close()
            self.strategy.optimizer.finish()
            raise

    def _new_saver(self) -> Saver:
        """Numbers go on above all that were ever given."""
        checkpoints, comm = self.folder.checkpoints, self.comm
        mine = Store(checkpoints).next_number() if comm.rank == 0 else 0
        number = int(comm.allreduce(np.array([mine], np.int64))[0])
        if self.settings.synchronous:
            return SynchronousSaver(self._snapshot, number)
        own = Store(worker_folder(checkpoints, comm.rank)).next_number()
        clock = self.origin.checkpoint.manifest["clock"] if self.origin is not None else None
        return AsynchronousSaver(self._snapshot, own, number, clock)

    def _agreed(self, position: Position, saver: Saver) -> Progressed:
        """What the ranks did together: a worker may have ended its last epoch before another was asked to stop."""
        epochs, saved = self.comm.allreduce(np.array([position.epoch, not saver.failed], np.int64), op="min")
        return Progressed(int(epochs), stopped=bool(epochs < self.settings.epochs), saved=bool(saved))

    def _conclude(self, progressed: Progressed, seconds: float) -> None:
        """All is saved already; the summary comes before the evaluation if there may not be time for both."""
        summary = self._summary(progressed, seconds)
        if progressed.stopped and self.comm.rank == 0:
            self.folder.write_summary(summary)
        prepared, size = self.prepared, self.settings.batch_size
        limit = _EVALUATION_OF_A_STOPPED_RUN if progressed.stopped else None
        held_out = evaluate(prepared.job, prepared.model, prepared.held_out, self.comm, size, limit=limit)
        if self.comm.rank == 0:
            self.folder.write_summary({**summary, **_figures(held_out)})
        self.comm.barrier()  # Open MPI ends the job when the first rank exits with a status: the summary comes first

    def _new_recorder(self) -> Recorder:
        settings, rank = self.settings, self.comm.rank
        label = f"{settings.job.stem} {settings.algorithm} x{self.comm.size}"
        progress = (
            new_progress(label, settings.epochs, self._share.steps, settings.terminal_columns)
            if rank == 0
            else Silent()
        )
        before = self.origin.done if self.origin is not None else NOTHING
        writes = rank == 0 or not settings.synchronous
        metrics = self.folder.metrics(None if settings.synchronous else rank, before.steps) if writes else None
        return Recorder(self.strategy, metrics, progress, settings.log_every, before)

    def _summary(self, progressed: Progressed, seconds: float) -> dict[str, Any]:
        """What is known before the evaluation; a collective. Figures are those of all parts of a run that went on."""
        samples = int(self.comm.allreduce(np.array([self._recorder.samples], np.int64))[0])
        wall = float(self.comm.allreduce(np.array([seconds]), op="max")[0])
        settings, origin = self.settings, self.origin
        newest = Store(self.folder.checkpoints).numbers()[-1:]
        return {
            "job": str(settings.job),
            "algorithm": settings.algorithm,
            "stopped": progressed.stopped,
            "resumed": self._snapshot.resumed,
            "resumed_from": None if origin is None else f"{CHECKPOINTS}/{origin.checkpoint.path.name}",
            "checkpoint": f"{CHECKPOINTS}/{newest[0]:06d}" if newest else None,
            "held_out_loss": None,
            "held_out_accuracy": None,
            "held_out_samples": None,
            "wall_seconds": wall,
            "samples": samples,
            "samples_per_second": samples / wall,
            "epochs": settings.epochs,
            "epochs_finished": progressed.epochs,
            "steps": self._recorder.steps,
            "batch_size": settings.batch_size,
            "communication_window": algorithms.window(settings),
            "max_clock_spread": settings.max_clock_spread,
            "hyperparameters": algorithms.parsed(settings),
            "seed": settings.seed,
            "options": {name: resuming.plain(value) for name, value in self.prepared.job.options.items()},
            **self.strategy.totals(),
            **_surroundings(self.comm, settings),
        }


def _surroundings(comm: Communicator, settings: Settings) -> dict[str, Any]:
    """What the summary says of ranks, machines and versions."""
    return {
        "ranks": comm.size,
        "servers": comm.servers,
        "shard": settings.shard,
        "nodes": comm.nodes,
        "link": (link := comm.topology.link) and link.as_dict(),
        "threads_per_rank": torch.get_num_threads(),
        "mpi": runtime.mpi_description(),
        "versions": {
            "mpidl": mpidl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": settings.command,
    }


def _figures(held_out: HeldOut | None) -> dict[str, Any]:
    if held_out is None:
        return {}
    return {
        "held_out_loss": held_out.loss,
        "held_out_accuracy": held_out.accuracy,
        "held_out_samples": held_out.samples,
    }
