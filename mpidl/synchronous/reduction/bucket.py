"""The flat memory of one bucket of gradients, and how far it has come in a round.

When a bucket is launched and written back is decided in `reducer`. Gradients stay where backward left them until they
are reduced: the reduction itself reads them scattered. Where this backward has made them, what was received takes their
place uncopied; others are overwritten. Those on a device are the business of `device_bucket`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch

from mpidl.arrays import view
from mpidl.arrays.layout import Bucket, Tensor, buckets
from mpidl.arrays.packing import Table
from mpidl.collectives import Collectives, GatherList
from mpidl.mpi import topology
from mpidl.optim.state import Named, dtype_name, memory_order
from mpidl.synchronous.reduction.result_buffer import ResultBuffer

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
        self._lends = False  # whether what was received can be a gradient itself
        self._gradients: dict[int, torch.Tensor | None] = {}
        self._replaced: list[torch.Tensor | None] = []
        self._weight = 1.0
        self._request: Any = None  # under way
        self._last: Any = None  # the same, until the next one is started
        self._waited = 0.0
        self._slots = dict(zip(bucket.members, bucket.layout.slots, strict=True))
        self._table = Table(tuple(s.count for s in bucket.layout.slots), tuple(s.offset for s in bucket.layout.slots))
        orders = {index: memory_order(parameters[index]) for index in bucket.members}
        self._orders = {index: order for index, order in orders.items() if order != tuple(range(len(order)))}
        self._strides = {index: _strides(parameters[index].shape, order) for index, order in orders.items()}
        self._allocate(np.dtype("float64" if bucket.layout.dtype == "float64" else "float32"))

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        self._memory = ResultBuffer(self.bucket.layout.count, dtype)
        self._receive = self._memory.now
        self._lends = dtype.name == self.bucket.layout.dtype

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

    def let_go(self) -> None:
        """Gives back the memory of gradients that backward has made and `write_back` has replaced.

        Not at once: malloc would return it to the system, and the next backward pay for every page of it again. So it
        goes when training without mpidl would give it back.
        """
        self._replaced.clear()

    def begin(self) -> None:
        """Forgets the gradients of the round before."""
        self.let_go()
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

    def write_back(
        self, used: np.ndarray[Any, Any], carried: np.ndarray[Any, Any], *, stepping: bool, made: Set[int]
    ) -> None:
        """Makes the reduced gradients the parameters', once the trailer is there.

        Args:
            used: of each parameter, whether some rank used it; another's gradient, mostly None, stays what it was.
            carried: of each parameter, whether it is `carried` on some rank.
            stepping: whether this rank brought gradients.
            made: parameters that had no gradient before this backward: whatever they have now, nobody else holds it.
        """
        gradients, lent = {}, None
        for index in self.bucket.members if stepping else ():
            parameter = self._parameters[index]
            if not used[index]:
                continue
            if self._lends and (parameter.grad is None or (index in made and not parameter.grad.requires_grad)):
                lent = self._memory.lend() if lent is None else lent
                self._replaced.append(parameter.grad)
                parameter.grad = lent.as_strided(parameter.shape, self._strides[index], self._slots[index].offset)
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter, requires_grad=False)
            gradients[index] = parameter.grad
        self._unpack(gradients)

    def _unpack(self, gradients: dict[int, torch.Tensor]) -> None:
        """Overwrites the gradients of some parameters, by index, with the reduced ones."""
        if not gradients:
            return
        targets = {index: self._in_order(index, gradient) for index, gradient in gradients.items()}
        dense = {index: dense_like(target) for index, target in targets.items()}
        table = self._table
        if len(gradients) < len(self.bucket.members):
            slots = [self._slots[index] for index in dense]
            table = Table(tuple(slot.count for slot in slots), tuple(slot.offset for slot in slots))
        flat = view.view(self._receive)
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
        self._memory.renew()
        self._receive = self._memory.now
        source = self._source(self.bucket.members)
        self._begin(ranks.start_gathered_sum(words, source, view.view(self._receive), total))

    def _source(self, members: Sequence[int | None]) -> GatherList:
        """What is read: the gradients of `members`, in the table's order."""
        present = {i: self._in_order(i, g).contiguous() for i, g in self._gradients.items() if g is not None}
        addresses = [0 if index not in present else present[index].data_ptr() for index in members]
        return GatherList(self._table, addresses, self.bucket.layout.dtype, self._weight, present)

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


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Returns the strides under which a tensor's dimensions lie in this order without gaps."""
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= shape[dimension]
    return strides


def dense_like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor itself if its elements lie in order, or else memory for as many that do."""
    if tensor.is_contiguous():
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def cut_into_buckets(named: Named, nbytes: int, order: Sequence[int] | None = None) -> tuple[Bucket, ...]:
    """Returns the buckets of these parameters, by their index, of at most so many bytes.

    Args:
        order: in which their gradients arrive; None: the last one first.
    """
    return buckets([Tensor(name, tuple(p.shape), dtype_name(p)) for name, p in named], nbytes, order)
