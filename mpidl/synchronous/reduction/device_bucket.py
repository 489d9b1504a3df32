"""The memory of a bucket of gradients on a device.

A full bucket is packed by one launch on the stream that computed the gradients, and copied to pinned host memory, and
later back, on a stream of its own, while backward goes on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.arrays.layout import Bucket
from mpidl.collectives import Collectives
from mpidl.synchronous.reduction.bucket import BucketMemory, dense_like, finish_writing


class DeviceBucketMemory(BucketMemory):
    """The memory of a bucket whose gradients lie on a device; host memory for sending and receiving is pinned.

    Ordering. The caller's stream gathers into `_flat`; the side stream waits for that and copies to the host; the host
    waits for the copy before it sends. After the reduction the side stream copies back into `_flat`, and the caller's
    stream waits for that and scatters. `_flat` is written again only after its last reader (`_read`).
    """

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter], collectives: Collectives) -> None:
        self._device = devices.of(arrays.view(parameters[bucket.members[0]]))
        super().__init__(bucket, parameters, collectives)
        self._streams: set[int] = set()
        self._copied: devices.Event | None = None  # None: some gradient is missing
        self._read: devices.Event | None = None
        self._packed: devices.Late | None = None

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        self.nbytes = self.bucket.layout.count * dtype.itemsize
        self._flat = devices.Memory(self._device, self.nbytes)
        self._send, self._receive = (self._device.pinned(self.nbytes).view(dtype) for _ in range(2))

    def begin(self, weight: int) -> None:
        super().begin(weight)
        self._streams.clear()
        self._copied = self._packed = None

    def add(self, index: int, gradient: torch.Tensor | None) -> None:
        super().add(index, gradient)
        self._streams.add(self._device.current_stream("torch"))
        if len(self.packed) == len(self.bucket.members):
            self._gather()

    def _gather(self) -> None:
        device, stream, item = self._device, self._device.current_stream("torch"), self._send.itemsize
        for other in self._streams - {stream}:  # backward may compute on several
            device.record(other).hold(stream)
        if self._read is not None:
            self._read.hold(stream)
        present = {i: self._in_order(i, g).contiguous() for i, g in self._gradients.items() if g is not None}
        for index, slot in self._slots.items():
            if index not in present:
                device.clear(self._flat.address + slot.offset * item, slot.count * item, stream)
        self._packed = None
        if present:
            self._packed = self._move("gather", present, float(self._weight), stream)
        gathered = device.record(stream)
        device.keep(gathered, list(present.values()))
        gathered.hold(device.side)
        device.copy(self._send.ctypes.data, self._flat.address, self.nbytes, device.side)
        self._copied = self._read = device.record(device.side)

    def ready(self) -> bool:
        return not self.patient and self._copied is not None and self._copied.Test()

    def launch(self, signature: tuple[int, int], total: int) -> None:
        if self._copied is not None:
            self._copied.wait()
        send, receive = arrays.view(self._send), arrays.view(self._receive)
        self._track(self._collectives.start_sum(signature, send, receive, total))

    def finite(self) -> bool:
        return self._packed is None or self._packed.result()[2]

    def _overwrite(self, gradients: dict[int, torch.Tensor]) -> None:
        device, stream = self._device, self._device.current_stream("torch")
        targets = {index: self._in_order(index, gradient) for index, gradient in gradients.items()}
        dense = {index: dense_like(target) for index, target in targets.items()}
        device.copy(self._flat.address, self._receive.ctypes.data, self.nbytes, device.side)
        device.record(device.side).hold(stream)
        self._move("scatter", dense, 1.0, stream)
        self._read = device.record(stream)
        device.keep(self._read, (dense, self._receive))
        finish_writing(targets, dense)

    def _move(self, name: str, tensors: dict[int, torch.Tensor], scale: float, stream: int) -> devices.Late:
        """Gathers or scatters some of the bucket's tensors by one launch."""
        slots = [self._slots[index] for index in tensors]
        views = [arrays.view(tensor) for tensor in tensors.values()]
        table = self._device.table(tuple(slot.count for slot in slots), tuple(slot.offset for slot in slots))
        dtypes = views[0].dtype, self._send.dtype.name
        moved: devices.Late = getattr(table, name)(
            [view.address for view in views], dtypes, self._flat.address, scale, stream
        )
        return moved
