"""Strategies: how the loop weighs a batch, records figures and saves the model, for each kind of algorithm.

The algorithms themselves are in `mpidl.synchronous` and `mpidl.parameter_server`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

import mpidl
from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError, DtypeError, SharedMemoryError
from mpidl.mpi import exit_protocol
from mpidl.training import algorithms
from mpidl.training.refusal import RefusedError
from mpidl.training.settings import Settings


@dataclass
class Tally:
    """What one rank has summed up since the last record."""

    loss: float = 0.0  # sum over the samples
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Shared:
    """What a checkpoint holds of all ranks together, apart from the optimiser."""

    model: dict[str, Any]  # as `state_dict` has it
    clock: int | None = None  # commits in it, asynchronous only
    center: torch.Tensor | None = None  # flat, where it is wider than the model's dtypes
    sums: torch.Tensor | None = None  # flat, the sums that lie with the center, if there are any


class Strategy(Protocol):
    """What the loop needs to know of a distributed optimiser."""

    optimizer: Any
    due: bool  # rank 0, or an asynchronous worker, finds it time for a checkpoint

    def weighted(self, count: int) -> contextlib.AbstractContextManager[Any]:
        """Says, around backward, how many samples this rank's batch holds."""

    def record(self, tally: Tally) -> dict[str, Any]:
        """Returns the figures since the last record; synchronous: afterwards `due` is alike on all ranks."""

    def shared(self) -> Shared:
        """Returns what is to be saved now; called on rank 0 only, no collective."""

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimiser's state; synchronous: a collective."""

    def own_state(self) -> dict[str, Any]:
        """Returns what this rank keeps besides model, buffers and optimiser."""

    def restore_own_state(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `own_state` returned."""

    def common_state(self) -> dict[str, torch.Tensor]:
        """Returns what all ranks keep alike, besides the model; called after `optimizer_state`."""

    def restore_common_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `common_state` returned, on other ranks than those that have an own state."""

    def restore_statistics(self, saved: Mapping[str, Any]) -> None:
        """Goes on with the counts of an earlier part of this run."""

    def totals(self) -> dict[str, Any]:
        """Returns what the summary says of communication and staleness; a collective, after `finish()`."""


class SynchronousStrategy:
    """All ranks take the same step: figures are reduced over the ranks, the model of any rank is that of all."""

    def __init__(self, optimizer: Any, model: torch.nn.Module, comm: Communicator) -> None:
        self.optimizer = optimizer
        self._model, self._comm = model, comm
        self._communicated = 0.0
        self.due = False

    def weighted(self, count: int) -> contextlib.AbstractContextManager[Any]:
        manager: contextlib.AbstractContextManager[Any] = self.optimizer.samples(count)
        return manager

    def record(self, tally: Tally) -> dict[str, Any]:
        """Figures of all ranks; a collective: every rank records after the same steps."""
        communicated = float(self.optimizer.statistics.seconds_communicating)
        mine = np.array([tally.loss, tally.samples, tally.seconds, communicated - self._communicated, self.due])
        self._communicated = communicated
        loss, samples, seconds, communicating, due = (float(x) for x in self._comm.allreduce(mine))
        self.due = due > 0
        size = self._comm.size
        return {
            "loss": loss / samples,
            "samples": int(samples),
            "samples_per_second": samples / (seconds / size),
            "seconds_communicating": communicating / size,
        }

    def shared(self) -> Shared:
        return Shared(dict(self._model.state_dict()))

    def optimizer_state(self) -> dict[str, Any]:
        """Of all ranks, whether they share it out or not."""
        state: dict[str, Any] = self.optimizer.full_state_dict()
        return state

    def own_state(self) -> dict[str, Any]:
        return {}

    def restore_own_state(self, saved: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def common_state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore_common_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Nothing is kept."""

    def restore_statistics(self, saved: Mapping[str, Any]) -> None:
        vars(self.optimizer.statistics).update(saved)
        self._communicated = float(self.optimizer.statistics.seconds_communicating)

    def totals(self) -> dict[str, Any]:
        statistics = self.optimizer.statistics
        mine = np.array([statistics.seconds_communicating, statistics.bytes], np.float64)
        communicating, nbytes = (float(x) for x in self._comm.allreduce(mine))
        return {"seconds_communicating": communicating / self._comm.size, "bytes": int(nbytes)}


class PeriodicStrategy(SynchronousStrategy):
    """All ranks step together, but have parameters of their own between rounds, whose average is saved."""

    def __init__(self, optimizer: Any, model: torch.nn.Module, comm: Communicator) -> None:
        super().__init__(optimizer, model, comm)
        self._averaged: dict[str, torch.Tensor] = {}

    def weighted(self, count: int) -> contextlib.AbstractContextManager[Any]:
        """Parameters are averaged and not gradients: batches have no weights."""
        return contextlib.nullcontext()

    def shared(self) -> Shared:
        """What `finish()` would make of the model, as `optimizer_state` found it."""
        return Shared({**self._model.state_dict(), **self._averaged})

    def optimizer_state(self) -> dict[str, Any]:
        """This rank's own; a collective, since the average is taken along with it."""
        self._averaged = self.optimizer.averaged()
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def common_state(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values) for name, values in self.optimizer.common_state().items()}

    def restore_common_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        self.optimizer.restore_common_state({name: values.numpy() for name, values in saved.items()})

    def own_state(self) -> dict[str, Any]:
        own = {name: torch.from_numpy(values) for name, values in self.optimizer.own_state().items()}
        return {**own, "optimizer": self.optimizer.state_dict()}

    def restore_own_state(self, saved: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["optimizer"])
        self.optimizer.restore_own_state({k: v.numpy() for k, v in saved.items() if k != "optimizer"})


class AsynchronousStrategy:
    """Workers step on their own: each records for itself, and the center variable is saved."""

    def __init__(self, optimizer: Any, model: torch.nn.Module, comm: Communicator) -> None:
        self.optimizer = optimizer
        self._model, self._comm = model, comm
        self._communicated = 0.0
        self.due = False

    def weighted(self, count: int) -> contextlib.AbstractContextManager[Any]:
        """No gradients are averaged: batches have no weights."""
        return contextlib.nullcontext()

    def record(self, tally: Tally) -> dict[str, Any]:
        """Figures of this worker alone; no collective."""
        statistics = self.optimizer.statistics
        communicated = float(statistics.seconds_communicating)
        since, self._communicated = communicated - self._communicated, communicated
        return {
            "rank": self._comm.rank,
            "loss": tally.loss / tally.samples,
            "samples": tally.samples,
            "samples_per_second": tally.samples / tally.seconds,
            "seconds_communicating": since,
            "commits": statistics.commits,
            "mean_staleness": statistics.mean_staleness,
            "seconds_waiting": statistics.seconds_waiting,
        }

    def shared(self) -> Shared:
        """The center variable in the model's dtypes, with this worker's buffers; one-sided, no collective."""
        model = dict(self._model.state_dict())
        clock, flat = self.optimizer.snapshot()
        center = self.optimizer.named(flat)
        for name, value in center.items():
            model[name] = value.to(model[name].dtype)
        wide = torch.from_numpy(flat)
        exact = all(value.dtype == wide.dtype for value in center.values())
        sums = self.optimizer.sums()
        return Shared(model, clock, None if exact else wide, None if sums is None else torch.from_numpy(sums))

    def optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def own_state(self) -> dict[str, Any]:
        return {name: torch.from_numpy(values) for name, values in self.optimizer.own_state().items()}

    def restore_own_state(self, saved: Mapping[str, Any]) -> None:
        self.optimizer.restore_own_state({name: values.numpy() for name, values in saved.items()})

    def common_state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore_common_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """It is saved with the center."""

    def restore_statistics(self, saved: Mapping[str, Any]) -> None:
        statistics = self.optimizer.statistics
        vars(statistics).update({**saved, "staleness": Counter(saved["staleness"])})
        self._communicated = float(statistics.seconds_communicating)

    def totals(self) -> dict[str, Any]:
        statistics = self.optimizer.statistics
        mine = np.array([statistics.seconds_communicating, statistics.bytes, statistics.commits], np.float64)
        communicating, nbytes, commits = (float(x) for x in self._comm.allreduce(mine))
        histogram = self._histogram(statistics.staleness)
        counted = sum(histogram.values())
        p50, p95, most = (_percentile(histogram, share) for share in (0.5, 0.95, 1.0))
        if counted and self._comm.rank == 0:
            mean = sum(tau * n for tau, n in histogram.items()) / counted
            exit_protocol.say(f"staleness of {counted} commits: mean {mean:.2f}, p50 {p50}, p95 {p95}, max {most}")
        return {
            "seconds_communicating": communicating / self._comm.size,
            "bytes": int(nbytes),
            "commits": int(commits),
            "mean_staleness": sum(tau * n for tau, n in histogram.items()) / counted if counted else 0.0,
            "staleness_p50": p50,
            "staleness_p95": p95,
            "staleness_max": most,
            "staleness": {str(tau): n for tau, n in sorted(histogram.items())},
        }

    def _histogram(self, mine: dict[int, int]) -> Counter[int]:
        """The histograms of all workers, added."""
        longest = int(self._comm.allreduce(np.array([max(mine, default=0)], np.int64), op="max")[0])
        counts = np.zeros(longest + 1, np.int64)
        for tau, n in mine.items():
            counts[tau] = n
        total = self._comm.allreduce(counts)
        return Counter({tau: int(n) for tau, n in enumerate(total) if n})


def _percentile(histogram: Mapping[int, int], share: float) -> int:
    """The least value that so large a share of what a histogram counts does not exceed; 0 if it counts nothing."""
    wanted, seen = share * sum(histogram.values()), 0
    for value, count in sorted(histogram.items()):
        seen += count
        if seen >= wanted:
            return value
    return 0


def new_strategy(
    settings: Settings, optimizer: torch.optim.Optimizer, model: torch.nn.Module, comm: Communicator
) -> Strategy:
    """Wraps the job's optimiser as the settings ask; a collective, as the constructors are.

    Raises:
        RefusedError: an algorithm cannot work with this optimiser, or with a hyperparameter.
    """
    algorithm = algorithms.BY_NAME[settings.algorithm]
    try:
        made = getattr(mpidl, algorithm.class_name)(optimizer, model, comm=comm, **algorithm.arguments(settings))
    except (ArgumentError, DtypeError, SharedMemoryError) as error:  # alike on every rank
        where = "--shard" if settings.shard else f"--algorithm {settings.algorithm}"
        raise RefusedError(f"{where}: {error}") from error
    if not algorithm.synchronous:
        return AsynchronousStrategy(made, model, comm)
    return (PeriodicStrategy if algorithm.periodic else SynchronousStrategy)(made, model, comm)
