"""All buckets of a model's gradients: which parameter travels in which, and the reduction of each.

When a bucket goes on its way is decided in `reducer`; what happens to its memory, in `bucket`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpidl.arrays.layout import Bucket, fingerprint
from mpidl.collectives import Collectives
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.bucket import BucketMemory, cut_into_buckets
from mpidl.synchronous.reduction.device_bucket import bucket_memory
from mpidl.synchronous.reduction.statistics import Statistics


class GradientBuckets:
    """The buckets of one optimiser; all ranks hold the same.

    Args:
        ranks: among whom gradients are reduced.
        named: parameters to reduce, with their names, in an order equal on all ranks.
        nbytes: size of a bucket in bytes.
        statistics: get what reductions take.
        memories: of the buckets, if the weights are shared: those lie as the buckets do, which then stay as they are.

    Attributes:
        memories: of each bucket, in the order in which they are launched.
        fingerprint: a number that differs where buckets differ.
        arrival: the order of parameters in which buckets fill, once it was seen; None before, or if they stay.
    """

    def __init__(
        self,
        ranks: Collectives,
        named: Named,
        nbytes: int,
        statistics: Statistics,
        memories: Sequence[BucketMemory] = (),
    ) -> None:
        self._ranks, self._named, self._nbytes, self._statistics = ranks, named, nbytes, statistics
        self.arrival: list[int] | None = None
        link = ranks.topology.link  # not measured: nothing that the bits of a sum depend on may change
        self.stay = bool(memories) or (link is not None and not link.measured)
        self.memories: list[BucketMemory] = list(memories)
        if memories:
            self._number([memory.bucket for memory in memories])
        else:
            self._cut(None)

    def _cut(self, order: Sequence[int] | None) -> None:
        cut = cut_into_buckets(self._named, self._nbytes, order)
        parameters = [parameter for _, parameter in self._named]
        self.memories = [bucket_memory(bucket, parameters) for bucket in cut]
        self._number(cut)

    def _number(self, cut: Sequence[Bucket]) -> None:
        self.fingerprint = fingerprint(cut)
        self._homes = {index: number for number, bucket in enumerate(cut) for index in bucket.members}

    def __len__(self) -> int:
        return len(self.memories)

    def home(self, index: int) -> int:
        """Returns the number of the bucket in which a parameter's gradient travels."""
        return self._homes[index]

    def let_go(self) -> None:
        """Gives back the memory of gradients that were replaced."""
        for memory in self.memories:
            memory.let_go()

    def begin(self, first: int = 0) -> None:
        """Forgets the gradients of the round before, in bucket `first` and those behind it."""
        for memory in self.memories[first:]:
            memory.begin()

    def pack(self, index: int, weight: int) -> None:
        """Notes a parameter's gradient, which counts `weight` times."""
        self.memories[self.home(index)].pack(index, self._named[index][1].grad, weight)

    def pack_rest(self, first: int, weight: int) -> None:
        """Notes what is missing in bucket `first` and those behind it."""
        for memory in self.memories[first:]:
            for index in memory.bucket.members:
                if index not in memory.packed:
                    self.pack(index, weight)

    def launch(self, number: int, sequence: int, total: int) -> None:
        """Starts a full bucket's reduction, once it can be sent.

        Args:
            number: which bucket.
            sequence: of the round, alike on all ranks.
            total: of all ranks' weights.
        """
        memory = self.memories[number]
        memory.ready(wait=True)
        memory.launch(self._ranks, (sequence, number), total)
        self._statistics.bytes += memory.nbytes

    def wait(self, number: int) -> None:
        """Returns when a bucket's reduction has completed."""
        self.memories[number].wait(self._ranks)
        self._statistics.note_bucket(number, self.memories[number].seconds())

    def follow(self, arrival: list[int]) -> None:
        """Cuts other buckets, which fill in this order of parameters; between two rounds, alike on all ranks."""
        self.arrival = arrival
        self._statistics.forget_buckets()
        self._cut(arrival)
