"""All buckets of a model: which parameter's gradient is in which bucket, and in which order buckets fill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpidl.arrays import view as arrays
from mpidl.arrays.layout import Bucket, Tensor, buckets, fingerprint
from mpidl.collectives import Collectives
from mpidl.optim.signature import gradient_dtype
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.bucket import BucketMemory
from mpidl.synchronous.reduction.device_bucket import DeviceBucketMemory


@dataclass(frozen=True)
class GradientBuckets:
    """The buckets of one optimiser; those of all ranks are equal."""

    memories: tuple[BucketMemory, ...]  # in the order in which they are launched
    homes: tuple[int, ...]  # of each parameter, the number of its bucket
    fingerprint: int  # differs where buckets differ


def cut_into_buckets(named: Named, nbytes: int, order: Sequence[int] | None = None) -> tuple[Bucket, ...]:
    """Returns the buckets of these parameters, by index, of at most `nbytes` bytes.

    Args:
        named: the parameters, with their names.
        nbytes: largest size of a bucket, unless a single parameter is larger.
        order: indices of the parameters in the order in which their gradients arrive; None: the last one first.
    """
    tensors = [Tensor(name, tuple(p.shape), str(gradient_dtype(p)).removeprefix("torch.")) for name, p in named]
    return buckets(tensors, nbytes, order)


def make_buckets(
    collectives: Collectives, named: Named, nbytes: int, order: Sequence[int] | None = None
) -> GradientBuckets:
    """Returns buckets with memory of the kind that fits the parameters' device; args as `cut_into_buckets`."""
    parameters = [parameter for _, parameter in named]
    kind = BucketMemory if arrays.view(parameters[0]).device == "cpu" else DeviceBucketMemory
    return with_homes([kind(bucket, parameters, collectives) for bucket in cut_into_buckets(named, nbytes, order)])


def with_homes(memories: Sequence[BucketMemory]) -> GradientBuckets:
    """Returns the buckets that have these memories, of which each parameter is in one."""
    homes = {index: number for number, memory in enumerate(memories) for index in memory.bucket.members}
    cut = [memory.bucket for memory in memories]
    return GradientBuckets(tuple(memories), tuple(homes[index] for index in range(len(homes))), fingerprint(cut))


def agree_on_arrival(collectives: Collectives, arrived: Iterable[int], count: int, rank: int) -> list[int]:
    """Returns the order in which gradients arrived on one rank, on every rank; a collective.

    Args:
        collectives: of all ranks.
        arrived: indices of parameters in the order in which gradients arrived here.
        count: number of parameters; those that are missing in `arrived` come last, the last one first.
        rank: whose order it is.
    """
    order = dict.fromkeys([*arrived, *reversed(range(count))])
    mine = np.array([*order], np.int64)
    ranks = collectives.topology
    everyone = np.empty((ranks.size, mine.size), np.int64)
    sequence = ranks.begin()
    ranks.wait(collectives.start_words_gather(mine, everyone), "the order of gradients", sequence)
    found: list[int] = everyone[rank].tolist()
    return found
