"""`--resume`: which checkpoint a run goes on from, whether it may, and how each rank takes up its part.

Rank 0 chooses and all ranks are told; then every rank reads what it needs itself and compares it with the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError
from mpidl.mpi import exit_protocol
from mpidl.mpi.placement import Link
from mpidl.training import algorithms
from mpidl.training.checkpoint import Checkpoint, Store, decode, decode_tensors, open_checkpoint
from mpidl.training.data import Position
from mpidl.training.metrics import Done
from mpidl.training.outputs import Folder
from mpidl.training.randomness import restore_random_state, seed_all, seed_for
from mpidl.training.refusal import everywhere
from mpidl.training.saving import LOCAL, MODEL, TRAINING, local_name, worker_folder
from mpidl.training.settings import Settings
from mpidl.training.snapshot import Snapshot

_OPTION = {
    "job": "JOB",
    "batch_size": "--batch-size",
    "communication_window": "--communication-window",
    "hyperparameters": "what --set gives",
}


def identity(settings: Settings, options: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Returns the settings that a run keeps when it goes on; others (epochs, ranks, --log-every) may change.

    Args:
        settings: what the user asked for.
        options: the job's own, parsed.
        samples: in the training data.
    """
    found = {
        "job": settings.job.name,
        "algorithm": settings.algorithm,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "communication_window": algorithms.window(settings),
        "hyperparameters": algorithms.parsed(settings),
        "options": {name: plain(value) for name, value in options.items()},
        "training_samples": samples,
        "job_sha256": hashlib.sha256(settings.job.read_bytes()).hexdigest(),
    }
    kept: dict[str, Any] = json.loads(json.dumps(found))
    return kept


def plain(value: object) -> object:
    """A value as JSON has it; what JSON has no form for, as text."""
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


@dataclass(frozen=True)
class Origin:
    """Where a run goes on from, as one rank sees it."""

    checkpoint: Checkpoint
    local: Checkpoint | None  # with what this rank alone held; None if the run had no such rank
    template: Checkpoint | None  # asynchronous: the worker that had come least far
    position: Position
    done: Done

    @property
    def resumed(self) -> int:
        """How often the run has gone on, this time included."""
        return int(self.checkpoint.manifest["resumed"]) + 1


def choose(comm: Communicator, folder: Folder, settings: Settings, kept: Mapping[str, Any]) -> Origin | None:
    """Makes the output folder ready and returns the checkpoint to go on from, None if the run starts anew.

    A collective.

    Raises:
        RefusedError: the folder holds a run and none may be replaced or gone on with; the settings differ from those
            of the run; or no checkpoint is whole. The folder is then as it was.
    """
    mine = everywhere(comm, lambda: _choose(folder, settings, kept) if comm.rank == 0 else {})
    plan = json.loads(comm.topology.gather_bytes(json.dumps(mine).encode(), "choosing a checkpoint")[0])
    if not plan:
        return None
    origin = everywhere(comm, lambda: _origin(comm, folder, settings, plan))
    if comm.rank == 0:
        exit_protocol.say(_said(comm, settings, origin))
    return origin


def _choose(folder: Folder, settings: Settings, kept: Mapping[str, Any]) -> dict[str, Any]:
    """On rank 0: the numbers of the checkpoints to use; empty if the run starts anew."""
    if not settings.resume:
        folder.prepare(settings.overwrite)
        return {}
    if settings.overwrite:
        raise ArgumentError("--resume and --overwrite contradict each other: give one of them")
    store = Store(folder.checkpoints)
    found = store.newest(exit_protocol.say)
    if found is None:
        folder.prepare_without_checkpoint()
        exit_protocol.say(f"--resume: no checkpoint in {folder.checkpoints}, training starts anew")
        return {}
    _check_settings(found, kept)
    workers: list[int | None] = []
    for rank in range(0 if settings.synchronous else found.manifest["world"]["ranks"]):
        newest = Store(worker_folder(folder.checkpoints, rank)).newest(exit_protocol.say)
        workers.append(None if newest is None else newest.number)
    store.set_aside(found.number, exit_protocol.say)
    for own in folder.checkpoints.glob("worker.*"):
        rank = int(own.suffix[1:])
        # Of a worker that the newest part of the run did not have, all: its state belongs to an earlier part.
        number = workers[rank] if rank < len(workers) else None
        Store(own).set_aside(number or 0, exit_protocol.say)
    return {"number": found.number, "workers": workers}


def _check_settings(found: Checkpoint, kept: Mapping[str, Any]) -> None:
    before = found.manifest["run"]
    for key, now in kept.items():
        if key in ("options", "job_sha256"):
            continue
        if before.get(key) != now:
            name = _OPTION.get(key, "the number of training samples" if key == "training_samples" else f"--{key}")
            raise ArgumentError(f"--resume: {name} was {before.get(key)} in {found.path}, is {now} now; give the same")
    for name in sorted({*before["options"], *kept["options"]}):
        old, new = before["options"].get(name, "nothing"), kept["options"].get(name, "nothing")
        if old != new:
            raise ArgumentError(f"--resume: the job's option {name} was {old!r} in {found.path}, is {new!r} now")
    if before["job_sha256"] != kept["job_sha256"]:
        exit_protocol.say(f"--resume: the job file {kept['job']} was changed since {found.path} was written")


def _origin(comm: Communicator, folder: Folder, settings: Settings, plan: Mapping[str, Any]) -> Origin:
    """What this rank goes on from; reads manifests only."""
    checkpoint = open_checkpoint(folder.checkpoints / f"{plan['number']:06d}")
    manifest = checkpoint.manifest
    before = int(manifest["world"]["ranks"])
    local = template = None
    if settings.synchronous:
        source = checkpoint
        local = checkpoint if checkpoint.has(local_name(comm.rank)) else None
        samples = manifest["samples"] if comm.rank == 0 else 0  # of all ranks
    else:
        workers = [_worker(folder.checkpoints, rank, number) for rank, number in enumerate(plan["workers"])]
        present = [worker for worker in workers if worker is not None]
        if not present:
            raise ArgumentError(f"--resume: no worker has a checkpoint of its own in {folder.checkpoints}")
        local = workers[comm.rank] if comm.rank < before else None
        template = min(present, key=lambda worker: (worker.manifest["steps"], worker.path.parent.name))
        source = template if local is None or comm.size != before else local
        gone = present if comm.rank == 0 else []  # samples of workers that are no more count as rank 0's
        samples = local.manifest["samples"] if local is not None else 0
        samples += sum(w.manifest["samples"] for w in gone if w in workers[comm.size :])
    position = Position(**source.manifest["position"]).among(before, comm.size, settings.batch_size)
    own = local or source
    return Origin(
        checkpoint, local, template, position, Done(source.manifest["steps"], samples, own.manifest["seconds"])
    )


def _worker(checkpoints: Path, rank: int, number: int | None) -> Checkpoint | None:
    return None if number is None else open_checkpoint(worker_folder(checkpoints, rank) / f"{number:06d}")


def _said(comm: Communicator, settings: Settings, origin: Origin) -> str:
    manifest, position = origin.checkpoint.manifest, origin.position
    text = (
        f"--resume: going on from {origin.checkpoint.path}: {position.epoch} of {settings.epochs} epochs finished, "
        f"{position.step} steps of the next one"
    )
    before, now = manifest["world"]["ranks"], comm.size
    if before != now:
        text += f"; written by {before} ranks, now {now}: the shares of the data differ"
    if now > before:
        text += f", random numbers of ranks {before} to {now - 1} begin from a seed of their own"
    if manifest["versions"]["torch"] != torch.__version__:
        text += f"; written with torch {manifest['versions']['torch']}, now {torch.__version__}: bits may differ"
    if position.epoch >= settings.epochs:
        text += "; nothing is left to train"
    return text


# Taking it up.


def reuse_link(origin: Origin, comm: Communicator) -> None:
    """Lets what was measured of the link between nodes hold on, if the ranks are placed as they were.

    Algorithms are chosen by it, and the bits of a sum depend on them. MPIDL_DETERMINISTIC=1 asks for none. Before the
    optimiser is made, on every rank.
    """
    world, now = origin.checkpoint.manifest["world"], comm.topology.link
    if now is not None and not now.measured:
        return
    if world.get("link") and world["nodes"] == list(comm.topology.placement.nodes):
        comm.topology.link = Link(**world["link"])


def load_model(origin: Origin, model: torch.nn.Module) -> None:
    """Gives the model the saved parameters and buffers; on every rank, before the optimiser is wrapped.

    Raises:
        ArgumentError: the saved model is another one.
    """
    saved: dict[str, Any] = decode_tensors(origin.checkpoint.read(MODEL))
    others = decode(origin.checkpoint.read(TRAINING))["others"]
    try:
        model.load_state_dict({**saved, **others})
    except RuntimeError as error:
        raise ArgumentError(f"--resume: the model in {origin.checkpoint.path} is another one: {error}") from error


def restore(origin: Origin, snapshot: Snapshot) -> None:
    """Gives this rank the rest of what was saved, the random numbers last; a collective.

    Raises:
        RefusedError: a file cannot be used; on every rank.
    """
    training = everywhere(snapshot.comm, lambda: decode(origin.checkpoint.read(TRAINING)))
    clock, arrival = origin.checkpoint.manifest["clock"], origin.checkpoint.manifest["world"].get("arrival")
    if arrival:
        snapshot.strategy.optimizer.arrival = arrival
    if clock is not None:
        center, sums = training["center"], training.get("sums")
        snapshot.strategy.optimizer.restore(
            clock, None if center is None else center.numpy(), None if sums is None else sums.numpy()
        )
    everywhere(snapshot.comm, lambda: _restore_rank(origin, snapshot, training))


def _restore_rank(origin: Origin, snapshot: Snapshot, training: Mapping[str, Any]) -> None:
    rank = snapshot.comm.rank
    local: dict[str, Any] = {}
    if origin.local is not None:
        local = decode(origin.local.read(local_name(rank) if origin.template is None else LOCAL))
    _load_optimizer(origin, snapshot, training if origin.template is None else local)
    if local:
        snapshot.strategy.restore_statistics(local["statistics"])
        buffers = dict(snapshot.model.named_buffers())
        with torch.no_grad():
            for name, value in local["buffers"].items():
                buffers[name].copy_(value)
        snapshot.strategy.optimizer._model_state.forget_counts()
        restore_random_state(local["random"])
    else:
        seed_all(seed_for(snapshot.settings.seed, rank, origin.done.steps))
    snapshot.strategy.optimizer.statistics.steps = origin.done.steps
    if origin.template is not None or origin.checkpoint.manifest["world"]["ranks"] == snapshot.comm.size:
        if local.get("own"):
            snapshot.strategy.restore_own_state(local["own"])
    else:
        snapshot.strategy.restore_common_state(training["common"])


def _load_optimizer(origin: Origin, snapshot: Snapshot, own: Mapping[str, Any]) -> None:
    """Loads optimiser and scheduler; a worker that is new, or one of another number of workers, takes the template's.

    A new worker's optimiser begins without moments.
    """
    template = origin.template
    as_template = template is not None and (
        origin.local is None or origin.checkpoint.manifest["world"]["ranks"] != snapshot.comm.size
    )
    hyper = decode(template.read(LOCAL)) if template is not None and as_template else own
    state = own["optimizer"]["state"] if own else {}
    snapshot.strategy.optimizer.load_state_dict({"state": state, "param_groups": hyper["optimizer"]["param_groups"]})
    if snapshot.scheduler is not None and hyper["scheduler"] is not None:
        snapshot.scheduler.load_state_dict(hyper["scheduler"])
