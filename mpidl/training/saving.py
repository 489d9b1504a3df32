"""When a run's checkpoints are written, by which rank, and what is in them.

Synchronous: all ranks together, at the same step. Each writes what it alone holds, `rank.<rank>.pt`, and rank 0 the
rest. Asynchronous: no rank waits for another. Rank 0 writes the center and its clock to `checkpoints/`, and each worker
at a commit of its own what it alone holds to `checkpoints/worker.<rank>/`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError
from mpidl.mpi import exit_protocol
from mpidl.training.checkpoint import Draft, Entry, Store, encode, encode_tensors
from mpidl.training.data import Position
from mpidl.training.refusal import RefusedError, everywhere
from mpidl.training.snapshot import Snapshot
from mpidl.training.strategies import Shared

MODEL, TRAINING, LOCAL = "model.safetensors", "training.pt", "local.pt"


def local_name(rank: int) -> str:
    """The file of what one rank alone holds, synchronous."""
    return f"rank.{rank}.pt"


def worker_folder(checkpoints: Path, rank: int) -> Path:
    """The folder of one worker's own checkpoints, asynchronous."""
    return checkpoints / f"worker.{rank}"


class Timer:
    """Tells when so many seconds have passed; never if None."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self.start()

    def start(self) -> None:
        """Counts from now."""
        self._started = time.monotonic()

    def rings(self) -> bool:
        """Returns whether the time is over."""
        return self._seconds is not None and time.monotonic() - self._started >= self._seconds


class Saver(Protocol):
    """Told by the loop where it stands; writes a checkpoint when it is time."""

    failed: bool  # the newest could not be written

    def after_step(self, position: Position) -> None:
        """Called within an epoch."""

    def after_epoch(self, position: Position) -> None:
        """Called at the end of an epoch, the scheduler stepped."""

    def before_finish(self, position: Position) -> None:
        """Called when the loop has ended, before the optimiser's `finish()`."""

    def after_finish(self, position: Position) -> None:
        """Called after it."""


class SynchronousSaver:
    """All ranks write one checkpoint together, at the end of each epoch and where they agreed to stop.

    With --checkpoint-every, also where they agreed in a record of metrics that it is time.

    Args:
        number: of the next checkpoint; equal on all ranks.
    """

    def __init__(self, snapshot: Snapshot, number: int) -> None:
        self._snapshot, self._number = snapshot, number
        self._saved = snapshot.recorder.steps
        self._timer = Timer(snapshot.settings.checkpoint_every if snapshot.comm.rank == 0 else None)
        self.failed = False

    def after_step(self, position: Position) -> None:
        """A wish of rank 0 travels with the next record; until then the others do not know it."""
        strategy = self._snapshot.strategy
        if strategy.due and self._snapshot.recorder.just_recorded:
            self._save(position)
        elif self._timer.rings():
            strategy.due = True

    def after_epoch(self, position: Position) -> None:
        self._save(position)

    def before_finish(self, position: Position) -> None:
        """What `finish()` does to the buffers must not be in the checkpoint: the run may go on from it."""
        if self._snapshot.recorder.steps != self._saved:
            self._save(position)

    def after_finish(self, position: Position) -> None:
        """Everything is saved."""

    def _save(self, position: Position) -> None:
        """A collective. What cannot be written leaves the checkpoint before it, and training goes on."""
        self._snapshot.strategy.due = False
        self._timer.start()
        comm, draft = self._snapshot.comm, Draft(self._snapshot.checkpoints, self._number)
        try:
            _on_rank_0(comm, draft.create)
            samples, entries = self._write(draft)
            _on_rank_0(comm, lambda: draft.commit(self._snapshot.manifest(position, samples), entries))
        except RefusedError as error:
            self.failed = True
            if comm.rank == 0:
                draft.drop()
                exit_protocol.say(f"checkpoint {self._number} could not be written, the one before it stays: {error}")
            return
        self._number, self._saved, self.failed = self._number + 1, self._snapshot.recorder.steps, False
        if comm.rank == 0:
            Store(self._snapshot.checkpoints).keep(self._snapshot.settings.keep)

    def _write(self, draft: Draft) -> tuple[int, dict[str, Entry]]:
        """Writes every rank's files; returns the samples of all ranks and what the manifest says of all files."""
        snapshot, comm = self._snapshot, self._snapshot.comm
        local, training = snapshot.local(), snapshot.optimizer()
        snapshot.strategy.optimizer._average_buffers(comm.topology)  # in the model that is saved, as at `finish()`
        try:
            mine = everywhere(comm, lambda: _refusing(lambda: self._files(draft, local, training)))
        finally:
            with torch.no_grad():
                for name, buffer in snapshot.model.named_buffers():
                    buffer.copy_(local["buffers"][name])
        words = {"samples": snapshot.recorder.samples, "files": {name: asdict(entry) for name, entry in mine.items()}}
        gathered = comm.topology.gather_bytes(json.dumps(words).encode(), "writing a checkpoint")
        everyone = [json.loads(text) for text in gathered]
        entries = {name: Entry(**entry) for each in everyone for name, entry in each["files"].items()}
        return sum(each["samples"] for each in everyone), entries

    def _files(self, draft: Draft, local: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Entry]:
        rank = self._snapshot.comm.rank
        entries = {local_name(rank): draft.add(local_name(rank), encode(local))}
        if rank == 0:
            entries |= _add_shared(draft, self._snapshot.strategy.shared(), training)
        return entries


class AsynchronousSaver:
    """Each worker writes for itself, at its first commit after it is time or an epoch has ended, and at the end.

    Args:
        number: of this worker's next checkpoint.
        shared_number: of the next checkpoint of the center; used on rank 0 only.
        clock: commits in the newest checkpoint of the center, None if there is none.
    """

    def __init__(self, snapshot: Snapshot, number: int, shared_number: int, clock: int | None) -> None:
        self._snapshot, self._number, self._shared_number = snapshot, number, shared_number
        self._saved, self._saved_clock = snapshot.recorder.steps, clock
        self._timer = Timer(snapshot.settings.checkpoint_every)
        self.failed = False
        self._local: dict[str, Any] = {}

    def after_step(self, position: Position) -> None:
        """Between two windows a worker holds nothing of its own but optimiser, buffers and random numbers."""
        strategy = self._snapshot.strategy
        if (strategy.due or self._timer.rings()) and strategy.optimizer.exchanged:
            strategy.due = False
            self._timer.start()
            self._local = self._captured()
            self._save(position)

    def after_epoch(self, position: Position) -> None:
        if position.epoch < self._snapshot.settings.epochs:
            self._snapshot.strategy.due = True
            self.after_step(position)

    def before_finish(self, position: Position) -> None:
        """Keeps this worker's own state: `finish()` makes the buffers of all ranks alike."""
        self._local = self._captured()

    def after_finish(self, position: Position) -> None:
        """The tail was committed meanwhile, after what may have been saved at the last step."""
        now = self._snapshot.exchanged()
        if now["statistics"]["commits"] != self._local["statistics"]["commits"]:
            self._saved = -1
        self._local |= now
        self._save(position)

    def _captured(self) -> dict[str, Any]:
        return {**self._snapshot.local(), **self._snapshot.optimizer()}

    def _save(self, position: Position) -> None:
        """No collective. What cannot be written leaves the checkpoint before it, and training goes on."""
        snapshot, rank = self._snapshot, self._snapshot.comm.rank
        try:
            if snapshot.recorder.steps != self._saved:
                self._save_local(position)
            if rank == 0:  # afterwards: where a center is, at least this worker's state is
                self._save_shared(position)
            self.failed = False
        except OSError as error:
            self.failed = True
            exit_protocol.say(f"rank {rank}: a checkpoint could not be written, the one before it stays: {error}")

    def _save_local(self, position: Position) -> None:
        snapshot = self._snapshot
        store = Store(worker_folder(snapshot.checkpoints, snapshot.comm.rank))
        draft = Draft(store.path, self._number)
        samples = snapshot.recorder.samples
        _write(draft, lambda: {LOCAL: draft.add(LOCAL, encode(self._local))}, snapshot.manifest(position, samples))
        self._number, self._saved = self._number + 1, snapshot.recorder.steps
        store.keep(snapshot.settings.keep)

    def _save_shared(self, position: Position) -> None:
        snapshot = self._snapshot
        shared = snapshot.strategy.shared()
        if shared.clock == self._saved_clock:
            return
        draft = Draft(snapshot.checkpoints, self._shared_number)
        manifest = snapshot.manifest(position, snapshot.recorder.samples, shared.clock)
        _write(draft, lambda: _add_shared(draft, shared, {"center": shared.center, "sums": shared.sums}), manifest)
        self._shared_number, self._saved_clock = self._shared_number + 1, shared.clock
        Store(snapshot.checkpoints).keep(snapshot.settings.keep)


def _add_shared(draft: Draft, shared: Shared, training: Mapping[str, Any]) -> dict[str, Entry]:
    """Writes the model, and in a second file `training` and what is no tensor in the model's state."""
    tensors = {name: value for name, value in shared.model.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in shared.model.items() if name not in tensors}
    return {
        MODEL: draft.add(MODEL, encode_tensors(tensors)),
        TRAINING: draft.add(TRAINING, encode({**training, "others": others})),
    }


def _write(draft: Draft, files: Callable[[], dict[str, Entry]], manifest: Mapping[str, Any]) -> None:
    """Writes a whole checkpoint by this rank alone."""
    try:
        draft.create()
        draft.commit(manifest, files())
    except OSError:
        draft.drop()
        raise


def _on_rank_0(comm: Communicator, phase: Callable[[], None]) -> None:
    everywhere(comm, lambda: _refusing(phase) if comm.rank == 0 else None)


def _refusing(phase: Callable[[], Any]) -> Any:
    """What the system refuses needs no traceback: a full disk, a folder without rights."""
    try:
        return phase()
    except OSError as error:
        raise ArgumentError(str(error)) from error
