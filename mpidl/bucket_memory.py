"""The flat memory of one bucket of gradients, and how far it has come in a round.

When a bucket is packed, launched and written back is decided in `reducer`. Here is where the gradients lie: in host
memory each is packed while it is hot in the cache; on a device a full bucket is packed by one launch on the stream that
computed it, and copied to pinned host memory, and later back, on a stream of its own, beside what backward computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpidl import arrays, devices, packing, topology
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
        packed: indices of the parameters whose gradients lie in the memory that is sent, or will when it is `ready`.
    """

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter]) -> None:
        self.bucket = bucket
        self.packed: set[int] = set()
        self._finite = True
        self._requests: list[Any] = []
        self._slots = dict(zip(bucket.members, bucket.layout.slots, strict=True))
        self._orders = {index: memory_order(parameters[index]) for index in bucket.members}
        self._allocate(np.dtype("float64" if bucket.layout.dtype == "float64" else "float32"))

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        self._send = np.empty(self.bucket.layout.count, dtype)
        self._receive = np.empty(self.bucket.layout.count, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that one reduction takes from this rank."""
        return int(self._send.nbytes)

    @property
    def full(self) -> bool:
        """Whether every parameter's gradient has been packed."""
        return len(self.packed) == len(self.bucket.members)

    @property
    def finite(self) -> bool:
        """Whether all that was packed in this round is finite; asked once the memory is `ready`."""
        return self._finite

    def begin(self) -> None:
        """Forgets what was packed."""
        self.packed.clear()
        self._finite = True

    def pack(self, index: int, gradient: torch.Tensor | None, weight: int) -> None:
        """Packs one parameter's gradient, times `weight`; only while no reduction is under way.

        None, and any gradient of weight 0, counts as zeros: not even a NaN may get through.
        """
        slot = self._slots[index]
        piece = self._send[slot.offset : slot.offset + slot.count]
        self.packed.add(index)
        if gradient is None or weight == 0:
            piece.fill(0)
        else:
            self._finite &= packing.pack([self._in_order(index, gradient)], piece, scale=float(weight)).finite

    def ready(self, *, wait: bool = False) -> bool:
        """Whether a full bucket lies in the memory that is sent; `wait` until it does."""
        return self.full

    def unpack(self, gradients: dict[int, torch.Tensor]) -> None:
        """Overwrites the gradients of some parameters, by index, with the reduced ones."""
        for index, gradient in gradients.items():
            slot = self._slots[index]
            piece = self._receive[slot.offset : slot.offset + slot.count]
            target = self._in_order(index, gradient)
            if target.is_contiguous():
                packing.unpack(piece, [target])
            else:
                dense = torch.empty_like(target, memory_format=torch.contiguous_format)
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

    def _in_order(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.detach().permute(self._orders[index])


class DeviceBucketMemory(BucketMemory):
    """The memory of a bucket whose gradients lie on a device; what is sent and received is pinned.

    Ordering. The caller's stream gathers into `_flat`; the side stream waits for that and copies to the host; the host
    waits for the copy before it sends. After the reduction the side stream copies back into `_flat`, and the caller's
    stream waits for that and scatters. `_flat` is written again only behind whoever read it last (`_read`).
    """

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter]) -> None:
        self._device = devices.of(arrays.view(parameters[bucket.members[0]]))
        super().__init__(bucket, parameters)
        self._gradients: dict[int, torch.Tensor | None] = {}
        self._streams: set[int] = set()
        self._copied: devices.Event | None = None  # None: not all gradients are there yet
        self._read: devices.Event | None = None
        self._written: devices.Late | None = None

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        nbytes = self.bucket.layout.count * dtype.itemsize
        self._flat = devices.Memory(self._device, nbytes)
        self._send, self._receive = (self._device.pinned(nbytes).view(dtype) for _ in range(2))

    @property
    def finite(self) -> bool:
        return self._written is None or self._written.result()[2]

    def begin(self) -> None:
        super().begin()
        self._gradients.clear()
        self._streams.clear()
        self._copied = self._written = None

    def pack(self, index: int, gradient: torch.Tensor | None, weight: int) -> None:
        self.packed.add(index)
        self._gradients[index] = None if gradient is None or weight == 0 else gradient.detach()
        self._streams.add(self._device.current_stream("torch"))
        if self.full:
            self._gather(float(weight))

    def _gather(self, weight: float) -> None:
        device, stream, item = self._device, self._device.current_stream("torch"), self._send.itemsize
        for other in self._streams - {stream}:  # backward may compute on several
            device.record(other).hold(stream)
        if self._read is not None:
            self._read.hold(stream)
        present = {i: self._in_order(i, g).contiguous() for i, g in self._gradients.items() if g is not None}
        for index, slot in self._slots.items():
            if index not in present:
                device.clear(self._flat.address + slot.offset * item, slot.count * item, stream)
        self._written = None
        if present:
            self._written = self._move("gather", present, weight, stream)
        gathered = device.record(stream)
        device.keep(gathered, list(present.values()))
        gathered.hold(device.side)
        device.copy(self._send.ctypes.data, self._flat.address, self.nbytes, device.side)
        self._copied = self._read = device.record(device.side)

    def ready(self, *, wait: bool = False) -> bool:
        if self._copied is None:
            return False
        if wait:
            self._copied.wait()
        return self._copied.Test()

    def unpack(self, gradients: dict[int, torch.Tensor]) -> None:
        device, stream = self._device, self._device.current_stream("torch")
        if not gradients:
            return
        targets = {index: self._in_order(index, gradient) for index, gradient in gradients.items()}
        dense = {
            index: one if one.is_contiguous() else torch.empty_like(one, memory_format=torch.contiguous_format)
            for index, one in targets.items()
        }
        device.copy(self._flat.address, self._receive.ctypes.data, self.nbytes, device.side)
        device.record(device.side).hold(stream)
        self._move("scatter", dense, 1.0, stream)
        self._read = device.record(stream)
        device.keep(self._read, (dense, self._receive))
        for index, target in targets.items():
            if dense[index] is target:
                arrays.mark_written(arrays.view(target))
            else:
                target.copy_(dense[index])

    def _move(self, name: str, tensors: dict[int, torch.Tensor], scale: float, stream: int) -> devices.Late:
        """One launch over some of the bucket's tensors."""
        slots = [self._slots[index] for index in tensors]
        views = [arrays.view(tensor) for tensor in tensors.values()]
        table = self._device.table(tuple(slot.count for slot in slots), tuple(slot.offset for slot in slots))
        dtypes = views[0].dtype, self._send.dtype.name
        moved: devices.Late = getattr(table, name)(
            [view.address for view in views], dtypes, self._flat.address, scale, stream
        )
        return moved


def bucket_memory(bucket: Bucket, parameters: list[torch.nn.Parameter]) -> BucketMemory:
    """Returns the memory of a bucket, of the kind that fits where its parameters lie."""
    kind = BucketMemory if arrays.view(parameters[bucket.members[0]]).device == "cpu" else DeviceBucketMemory
    return kind(bucket, parameters)
