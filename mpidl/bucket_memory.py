"""The flat memory of one bucket of gradients, and how far it has come in a round.

When a bucket is packed, launched and written back is decided in `reducer`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpidl import arrays, packing, topology
from mpidl.layout import Bucket
from mpidl.state import memory_order
from mpidl.topology import Topology

# MPI knows the memory of a running reduction by its address only: this keeps it alive, even if an interrupted backward
# drops the optimizer and the model.
_under_way: set[BucketMemory] = set()


class BucketMemory:
    """What one bucket sends and receives; both are float32, or float64 for float64 parameters.

    Args:
        bucket: which parameters travel in it, by index.
        parameters: all parameters; their order in memory is that in which gradients lie here, on every rank.

    Attributes:
        bucket: which parameters travel in it.
        packed: indices of the parameters whose gradients lie in the memory that is sent.
    """

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter]) -> None:
        dtype = "float64" if bucket.layout.dtype == "float64" else "float32"
        self.bucket = bucket
        self.packed: set[int] = set()
        self._send = np.empty(bucket.layout.count, dtype)
        self._receive = np.empty(bucket.layout.count, dtype)
        self._requests: list[Any] = []
        self._slots = dict(zip(bucket.members, bucket.layout.slots, strict=True))
        self._orders = {index: memory_order(parameters[index]) for index in bucket.members}

    @property
    def nbytes(self) -> int:
        """Bytes that one reduction takes from this rank."""
        return self._send.nbytes

    @property
    def full(self) -> bool:
        """Whether every parameter's gradient has been packed."""
        return len(self.packed) == len(self.bucket.members)

    def pack(self, index: int, gradient: torch.Tensor | None, weight: int) -> bool:
        """Packs one parameter's gradient, times `weight`; only while no reduction is under way.

        Returns:
            Whether it is finite. None, and any gradient of weight 0, counts as zeros: not even a NaN may get through.
        """
        slot = self._slots[index]
        piece = self._send[slot.offset : slot.offset + slot.count]
        self.packed.add(index)
        if gradient is None or weight == 0:
            piece.fill(0)
            return True
        return packing.pack([gradient.detach().permute(self._orders[index])], piece, scale=float(weight)).finite

    def unpack(self, index: int, gradient: torch.Tensor) -> None:
        """Overwrites one parameter's gradient with the reduced one."""
        slot = self._slots[index]
        piece = self._receive[slot.offset : slot.offset + slot.count]
        target = gradient.detach().permute(self._orders[index])
        if target.is_contiguous():
            packing.unpack(piece, [target])
        else:
            dense = torch.empty(target.shape, dtype=target.dtype)
            packing.unpack(piece, [dense])
            target.copy_(dense)

    def launch(self, ranks: Topology) -> None:
        """Starts the sum over all ranks; they launch their buckets in the same order."""
        self._requests = ranks.start_allreduce(arrays.view(self._send), arrays.view(self._receive), "sum")
        _under_way.add(self)

    def advance(self) -> None:
        """Lets MPI work on the reduction; never blocks."""
        self._requests = [request for request in self._requests if not request.Test()]
        self._settle()

    def wait(self, ranks: Topology) -> None:
        """Returns when the reduction has completed."""
        topology.wait_all(ranks, self._requests, "the reduction of gradients", ranks.channel.sequence, self)
        self._requests = []
        self._settle()

    def divide(self, total: int) -> None:
        """Turns the sum that was received into a mean."""
        if total != 1:
            np.divide(self._receive, total, out=self._receive)

    def _settle(self) -> None:
        if not self._requests:
            _under_way.discard(self)
