"""The memory of a bucket of which each rank receives its own block only: the gradients of its pieces.

A parameter's `grad` is then a *mark*, which stands for the reduced gradient (`mark`). The next backward finds the mark
and puts zeros in its place, so that autograd can add this rank's new gradient; the gradient that was reduced before is
then *carried*: added to the result.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from typing import Any

import numpy as np
import torch

from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.collectives import Collectives, Shards
from mpidl.synchronous.reduction.bucket import BucketMemory
from mpidl.synchronous.reduction.trailer import Trailer
from mpidl.synchronous.sharded.mark import Mark, Parts
from mpidl.synchronous.sharded.partition import Partition
from mpidl.synchronous.sharded.weights import Weights


class ShardedBucketMemory(BucketMemory):
    """The memory of one bucket of sharded weights; the methods keep what those of `BucketMemory` promise.

    Args:
        partition: the bucket, cut into one block per rank.
        weights: whose pieces get the gradients.
        shards: the ranks' groups and lanes.
        collectives: of all ranks.
        parts: what the marks stand for.
    """

    def __init__(
        self, partition: Partition, weights: Weights, shards: Shards, collectives: Collectives, parts: Parts
    ) -> None:
        self._partition, self._shards, self._pieces = partition, shards, weights.pieces
        self._segments, self._parts = partition.segments(), parts
        super().__init__(partition.bucket, weights.parameters, collectives)
        self._table = Table(self._segments.counts, self._segments.offsets)
        self._marks = {index: Mark(weights.parameters[index], index, parts) for index in partition.bucket.members}
        self._fresh: dict[int, torch.Tensor] = {}  # gradients that began as zeros, in place of a mark
        self._handles = [
            weights.parameters[i].register_hook(partial(self._before_gradient, i))  # type: ignore[no-untyped-call]
            for i in partition.bucket.members
        ]

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        self._receive = np.empty(self._partition.size, dtype)
        self.nbytes = self._partition.count * self._receive.itemsize

    def _before_gradient(self, index: int, _: torch.Tensor) -> None:
        parameter = self._parameters[index]
        if parameter.grad is self._marks[index]:
            self._fresh[index] = parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        elif parameter.grad is not self._fresh.get(index):
            self._fresh.pop(index, None)

    def add(self, index: int, gradient: torch.Tensor | None) -> None:
        if gradient is self._marks[index]:
            gradient = None
        elif index in self._fresh and gradient is not None and index not in self.packed:
            self._fresh[index] = gradient  # with create_graph autograd adds out of place
        super().add(index, gradient)

    def carried(self) -> Sequence[int]:
        return [index for index in self.bucket.members if self._carries(index)]

    def _carries(self, index: int) -> bool:
        gradient = self._parameters[index].grad
        return gradient is not None and (gradient is self._marks[index] or gradient is self._fresh.get(index))

    def launch(self, signature: tuple[int, int], total: int) -> None:
        # The result must not overwrite a carried gradient; a rank in `finish()` does not know which ones are carried.
        for index in self.bucket.members:
            piece = self._pieces[index].tensor
            if piece.grad is not None and (self._weight == 0 or self._carries(index)):
                piece.grad = piece.grad.clone()
        source = self._gather_list(self._segments.members)
        self._track(self._shards.start_reduce(signature, source, view.view(self._receive), total))

    def write_back(self, trailer: Trailer, *, stepping: bool, made: Set[int], given: Set[int]) -> None:
        received = torch.from_numpy(self._receive)
        begin = self._shards.block * self._partition.size
        for index, slot in self._partition.slots.items():
            piece = self._pieces[index]
            if trailer.used[index]:
                at = slot.offset + piece.start - begin
                gradient = received[at : at + piece.stop - piece.start] if piece.owned else received[:0]
                gradient = gradient.to(piece.tensor.dtype)
                if trailer.carried[index] and piece.tensor.grad is not None:
                    gradient = piece.tensor.grad + gradient
                piece.tensor.grad = gradient if piece.owned or not slot.count else None
                self.replaced.append(self._parameters[index].grad)
                self._parameters[index].grad = self._marks[index]
            elif not trailer.carried[index]:
                piece.tensor.grad = None
            else:
                self._mark_again(index)
        self._fresh.clear()
        self._parts.changed()

    def _mark_again(self, index: int) -> None:
        """Takes zeros away to which no backward has added a gradient (`torch.autograd.grad` calls the hook too)."""
        if self._parameters[index].grad is self._fresh.get(index, self):
            self._parameters[index].grad = self._marks[index]

    def reduced(self, index: int) -> bool | None:
        """Returns whether a parameter has a reduced gradient; None if the user has replaced the gradient."""
        self._mark_again(index)
        gradient = self._parameters[index].grad
        return False if gradient is None else True if gradient is self._marks[index] else None

    def close(self) -> None:
        """Takes the hooks and the marks off the parameters."""
        self.replaced.clear()
        for handle in self._handles:
            handle.remove()
        for index, mark in self._marks.items():
            if self._parameters[index].grad is mark:
                self._parameters[index].grad = None
        self._receive = np.empty(0, self._receive.dtype)
