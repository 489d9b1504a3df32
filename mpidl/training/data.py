"""Loaders: shuffled shares of the training data, exact shares of the held-out data; nothing communicates here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torch.utils.data.distributed import DistributedSampler


@dataclass(frozen=True)
class Share:
    """One rank's share of the training data, shuffled anew each epoch; all ranks have equally many batches.

    torch's DistributedSampler repeats a few samples so that the shares are equal, and `steps` is the same everywhere.
    """

    loader: DataLoader[Any]
    sampler: DistributedSampler[Any]
    batch_size: int

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return len(self.loader)

    def epoch(self, number: int) -> Iterator[tuple[Any, int]]:
        """Yields the epoch's batches, each with its count of samples; the last may be shorter."""
        self.sampler.set_epoch(number)
        left = len(self.sampler)
        for batch in self.loader:
            yield batch, min(self.batch_size, left)
            left -= self.batch_size


def training_share(dataset: Dataset[Any], rank: int, size: int, batch_size: int, seed: int) -> Share:
    """Returns the share of `rank` among `size` ranks."""
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=size, rank=rank, seed=seed)
    return Share(DataLoader(dataset, batch_size=batch_size, sampler=sampler), sampler, batch_size)


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
