"""Loaders: shuffled shares of the training data, exact shares of the held-out data; nothing communicates here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torch.utils.data.distributed import DistributedSampler


@dataclass(frozen=True)
class Position:
    """How far one rank has come in the training data."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps taken in the epoch under way
    done: int = 0  # samples of this rank's share used in it

    def after(self, count: int) -> Position:
        """Returns the position one step of `count` samples further."""
        return Position(self.epoch, self.step + 1, self.done + count)

    def among(self, ranks: int, now: int, batch_size: int) -> Position:
        """Returns where each of `now` ranks stands when `ranks` ranks stood here.

        An epoch's order is the same for every number of ranks, and ranks take samples from it in turn: so no sample
        comes twice, but for fewer than `now` that do not fill a turn.
        """
        if ranks == now:
            return self
        done = self.done * ranks // now
        return Position(self.epoch, math.ceil(done / batch_size), done)


class _Rest(Sampler[int]):
    """What another sampler gives after the first `skipped` indices."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = sampler
        self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self._sampler), self.skipped, None)

    def __len__(self) -> int:
        return len(self._sampler)


class Share:
    """One rank's share of the training data, shuffled anew each epoch; all ranks have equally many batches.

    torch's DistributedSampler repeats a few samples so that the shares are equal, and `tasks` is the same everywhere.
    """

    def __init__(self, dataset: Dataset[Any], sampler: DistributedSampler[Any], batch_size: int) -> None:
        self._sampler, self._rest = sampler, _Rest(sampler)
        self._loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, sampler=self._rest)
        self._batch_size = batch_size

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self._sampler) / self._batch_size)

    def last_step(self, start: Position) -> int:
        """Returns the number of the epoch's last step when it is gone on with from `start`."""
        return start.step + math.ceil((len(self._sampler) - start.done) / self._batch_size)

    def epoch(self, start: Position) -> Iterator[tuple[Any, int]]:
        """Returns the batches of an epoch that are left at `start`, each with its count of samples.

        The last may be shorter. Random numbers are drawn as if the epoch had not been interrupted.
        """
        self._sampler.set_epoch(start.epoch)
        self._rest.skipped = start.done
        with torch.random.fork_rng(devices=[], enabled=start.step > 0):
            batches = iter(self._loader)  # a loader draws one number when an epoch begins
        return self._counted(batches, len(self._sampler) - start.done)

    def _counted(self, batches: Iterator[Any], left: int) -> Iterator[tuple[Any, int]]:
        for batch in batches:
            yield batch, min(self._batch_size, left)
            left -= self._batch_size


def training_share(dataset: Dataset[Any], rank: int, size: int, batch_size: int, seed: int) -> Share:
    """Returns the share of `rank` among `size` ranks."""
    return Share(dataset, DistributedSampler(dataset, num_replicas=size, rank=rank, seed=seed), batch_size)


def held_out_batches(dataset: Any, rank: int, size: int, batch_size: int) -> Iterator[tuple[Any, int]]:
    """Yields this rank's part of the held-out data: every sample is in one rank's part, once; none is repeated."""
    indices = range(rank, len(dataset), size)
    loader: DataLoader[Any] = DataLoader(Subset(dataset, indices), batch_size=batch_size)
    left = len(indices)
    for batch in loader:
        yield batch, min(batch_size, left)
        left -= batch_size


def first_batch(dataset: Any, batch_size: int) -> Any:
    """Returns the first samples of `dataset` as one batch."""
    return default_collate([dataset[i] for i in range(min(batch_size, len(dataset)))])
