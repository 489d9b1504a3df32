"""The flat memory of one bucket of gradients, and how far it has come in a round.

When a bucket is launched and written back is decided in `reducer`. In host memory the gradients stay where backward
left them until they are reduced: the reduction itself reads them scattered. On a device a full bucket is packed by one
launch on the stream that computed it, and copied to pinned host memory, and later back, on a stream of its own, beside
what backward computes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpidl import arrays, devices, topology
from mpidl.collectives import Collectives, Source
from mpidl.layout import Bucket, Tensor, buckets
from mpidl.packing import Table
from mpidl.state import Named, dtype_name, memory_order

# MPI knows the memory of a running reduction by its address only: this keeps it alive, even if an interrupted backward
# drops the optimizer and the model.
_under_way: set[BucketMemory] = set()


class BucketMemory:
    """What one bucket receives: float32, or float64 for float64 parameters.

    Args:
        bucket: which parameters travel in it, by index.
        parameters: all parameters; their order in memory is that in which gradients lie here, on every rank.

    Attributes:
        bucket: which parameters travel in it.
        packed: indices of the parameters whose gradients are sent, or will be when it is `ready`.
    """

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter]) -> None:
        self.bucket = bucket
        self.packed: set[int] = set()
        self._parameters = parameters
        self._gradients: dict[int, torch.Tensor | None] = {}
        self._weight = 1.0
        self._request: Any = None  # under way
        self._last: Any = None  # the same, until the next one is started
        self._waited = 0.0
        self._slots = dict(zip(bucket.members, bucket.layout.slots, strict=True))
        self._table = Table(tuple(s.count for s in bucket.layout.slots), tuple(s.offset for s in bucket.layout.slots))
        orders = {index: memory_order(parameters[index]) for index in bucket.members}
        self._orders = {index: order for index, order in orders.items() if order != tuple(range(len(order)))}
        self._allocate(np.dtype("float64" if bucket.layout.dtype == "float64" else "float32"))

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        self._receive = np.empty(self.bucket.layout.count, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that one reduction takes from this rank."""
        return int(self._receive.nbytes)

    @property
    def full(self) -> bool:
        """Whether every parameter's gradient is there."""
        return len(self.packed) == len(self.bucket.members)

    @property
    def finite(self) -> bool:
        """Whether all that was sent in this round is finite; asked once the reduction has completed."""
        return self._last is None or bool(self._last.finite)

    def seconds(self) -> tuple[float, float, float]:
        """What the last reduction took: packing, reducing, and waiting for others at the end of backward."""
        packing, reducing = self._last.seconds if self._last is not None else (0.0, 0.0)
        return packing, reducing, self._waited

    def begin(self) -> None:
        """Forgets the gradients of the round before."""
        self.packed.clear()
        self._gradients.clear()
        self._last = None

    def pack(self, index: int, gradient: torch.Tensor | None, weight: int) -> None:
        """Notes one parameter's gradient, which counts `weight` times; only while no reduction is under way.

        None, and any gradient of weight 0, counts as zeros: not even a NaN may get through.
        """
        self.packed.add(index)
        self._gradients[index] = None if gradient is None or weight == 0 else gradient.detach()
        self._weight = float(weight)

    def ready(self, *, wait: bool = False) -> bool:
        """Whether a full bucket can be sent; `wait` until it can."""
        return self.full

    def carried(self) -> Sequence[int]:
        """The parameters of which what was reduced before is added to the result, not being in the gradient itself."""
        return ()

    def write_back(self, used: np.ndarray[Any, Any], carried: np.ndarray[Any, Any], *, stepping: bool) -> None:
        """Makes the reduced gradients the parameters', once the trailer is there.

        Args:
            used: of each parameter, whether some rank used it; another's gradient, mostly None, stays what it was.
            carried: of each parameter, whether it is `carried` on some rank.
            stepping: whether this rank brought gradients.
        """
        gradients = {}
        for index in self.bucket.members if stepping else ():
            parameter = self._parameters[index]
            if used[index]:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter, requires_grad=False)
                gradients[index] = parameter.grad
        self._unpack(gradients)

    def _unpack(self, gradients: dict[int, torch.Tensor]) -> None:
        """Overwrites the gradients of some parameters, by index, with the reduced ones."""
        if not gradients:
            return
        targets = {index: self._in_order(index, gradient) for index, gradient in gradients.items()}
        dense = {index: _dense_like(target) for index, target in targets.items()}
        table = self._table
        if len(gradients) < len(self.bucket.members):
            slots = [self._slots[index] for index in dense]
            table = Table(tuple(slot.count for slot in slots), tuple(slot.offset for slot in slots))
        flat = arrays.view(self._receive)
        addresses = [one.data_ptr() for one in dense.values()]
        table.scatter(addresses, self.bucket.layout.dtype, flat.address, flat.dtype)
        self._written(targets, dense)

    def launch(self, ranks: Collectives, words: tuple[int, int], total: int) -> None:
        """Starts the mean over all ranks, by weight; they launch their buckets in the same order.

        Args:
            ranks: among whom.
            words: which reduction this is, alike on all of them.
            total: of all their weights.
        """
        source = self._source(self.bucket.members)
        self._begin(ranks.start_gathered_sum(words, source, arrays.view(self._receive), total))

    def _source(self, members: Sequence[int | None]) -> Source:
        """What is read: the gradients of `members`, in the table's order."""
        present = {i: self._in_order(i, g).contiguous() for i, g in self._gradients.items() if g is not None}
        addresses = [0 if index not in present else present[index].data_ptr() for index in members]
        return Source(self._table, addresses, self.bucket.layout.dtype, self._weight, present)

    def _begin(self, request: Any) -> None:
        self._request = self._last = request
        self._waited = 0.0
        _under_way.add(self)
        self.advance()

    def advance(self) -> None:
        """Lets the reduction go on; never blocks."""
        if self._request is not None and self._request.Test():
            self._settle()

    def wait(self, ranks: Collectives) -> None:
        """Returns when the reduction has completed."""
        if self._request is not None:
            at, before, started = ranks.topology, sum(self._last.seconds), time.perf_counter()
            topology.wait_all(at, [self._request], "the reduction of gradients", at.channel.sequence, self)
            worked = sum(self._last.seconds) - before
            self._waited = max(0.0, time.perf_counter() - started - worked)
            self._settle()

    def _settle(self) -> None:
        self._request = None
        self._gradients.clear()
        _under_way.discard(self)

    def _in_order(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        order = self._orders.get(index)  # None: as it stands
        return gradient.detach() if order is None else gradient.detach().permute(order)

    @staticmethod
    def _written(targets: dict[int, torch.Tensor], dense: dict[int, torch.Tensor]) -> None:
        """Copies what was unpacked beside a strided gradient into it; tells autograd of the others."""
        for index, target in targets.items():
            if dense[index] is not target:
                target.copy_(dense[index])
        torch.autograd.graph.increment_version([one for one in targets.values() if not one.is_inference()])


class DeviceBucketMemory(BucketMemory):
    """The memory of a bucket whose gradients lie on a device; what is sent and received is pinned.

    Ordering. The caller's stream gathers into `_flat`; the side stream waits for that and copies to the host; the host
    waits for the copy before it sends. After the reduction the side stream copies back into `_flat`, and the caller's
    stream waits for that and scatters. `_flat` is written again only behind whoever read it last (`_read`).
    """

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter]) -> None:
        self._device = devices.of(arrays.view(parameters[bucket.members[0]]))
        super().__init__(bucket, parameters)
        self._streams: set[int] = set()
        self._copied: devices.Event | None = None  # None: not all gradients are there yet
        self._read: devices.Event | None = None
        self._packed: devices.Late | None = None

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        nbytes = self.bucket.layout.count * dtype.itemsize
        self._flat = devices.Memory(self._device, nbytes)
        self._send, self._receive = (self._device.pinned(nbytes).view(dtype) for _ in range(2))

    @property
    def finite(self) -> bool:
        return self._packed is None or self._packed.result()[2]

    def begin(self) -> None:
        super().begin()
        self._streams.clear()
        self._copied = self._packed = None

    def pack(self, index: int, gradient: torch.Tensor | None, weight: int) -> None:
        super().pack(index, gradient, weight)
        self._streams.add(self._device.current_stream("torch"))
        if self.full:
            self._gather(self._weight)

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
        self._packed = None
        if present:
            self._packed = self._move("gather", present, weight, stream)
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

    def _unpack(self, gradients: dict[int, torch.Tensor]) -> None:
        device, stream = self._device, self._device.current_stream("torch")
        if not gradients:
            return
        targets = {index: self._in_order(index, gradient) for index, gradient in gradients.items()}
        dense = {index: _dense_like(target) for index, target in targets.items()}
        device.copy(self._flat.address, self._receive.ctypes.data, self.nbytes, device.side)
        device.record(device.side).hold(stream)
        self._move("scatter", dense, 1.0, stream)
        self._read = device.record(stream)
        device.keep(self._read, (dense, self._receive))
        self._written(targets, dense)

    def launch(self, ranks: Collectives, words: tuple[int, int], total: int) -> None:
        self._begin(ranks.start_sum(words, arrays.view(self._send), arrays.view(self._receive), total))

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


def _dense_like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor itself if its elements lie in order, or else memory for as many that do."""
    if tensor.is_contiguous():
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def bucket_memory(bucket: Bucket, parameters: list[torch.nn.Parameter]) -> BucketMemory:
    """Returns the memory of a bucket, of the kind that fits where its parameters lie."""
    kind = BucketMemory if arrays.view(parameters[bucket.members[0]]).device == "cpu" else DeviceBucketMemory
    return kind(bucket, parameters)


def cut_into_buckets(named: Named, nbytes: int) -> tuple[Bucket, ...]:
    """Returns the buckets of these parameters, by their index, of at most so many bytes."""
    return buckets([Tensor(name, tuple(p.shape), dtype_name(p)) for name, p in named], nbytes)
