"""The memory of one bucket of gradients, and the state of the bucket's reduction within a round.

`Round` decides when a bucket is launched and written back. Gradients stay where backward left them until they are
reduced: the reduction reads them scattered. Where this backward has made a gradient, a view of the result takes the
gradient's place and nothing is copied; other gradients are overwritten. Gradients on a device are in `device_bucket`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch

from mpidl.arrays.layout import Bucket
from mpidl.arrays.packing import Table
from mpidl.collectives import Collectives, GatherList
from mpidl.errors import DtypeError
from mpidl.mpi import topology
from mpidl.optim.signature import facts_of
from mpidl.optim.state import memory_order
from mpidl.synchronous.reduction.result_buffer import ResultBuffer
from mpidl.synchronous.reduction.trailer import Trailer

# MPI knows the memory of a running reduction by its address only: this set keeps the memory alive, even if an
# interrupted backward drops the optimizer and the model.
_under_way: set[BucketMemory] = set()


class BucketMemory:
    """What one bucket receives: float32, or float64 for float64 parameters.

    Args:
        bucket: which parameters' gradients are in the bucket, by index.
        parameters: all parameters; a parameter's order in memory is that in which its gradient lies here, on every
            rank.
        collectives: of the ranks among whom gradients are reduced.

    Attributes:
        bucket: as given.
        nbytes: bytes that one reduction takes from this rank.
        packed: indices of the parameters whose gradients were added in this round.
        patient: whether the bucket waits for the end of backward, since gradients have changed after its launch before.
        refused: what is wrong with a gradient that was added in this round; None: nothing.
        replaced: gradients that backward made and `write_back` replaced. Their memory is not given back at once: malloc
            would return it to the system, and the next backward would pay for every page again. `Reducer` clears the
            list when training without mpidl would give the memory back.
    """

    nbytes: int

    def __init__(self, bucket: Bucket, parameters: list[torch.nn.Parameter], collectives: Collectives) -> None:
        self.bucket = bucket
        self.packed: set[int] = set()
        self.patient = False
        self.refused: DtypeError | None = None
        self.replaced: list[torch.Tensor | None] = []
        self._parameters, self._collectives = parameters, collectives
        self._reusable = False  # whether a view of the result can be a gradient
        self._gradients: dict[int, torch.Tensor | None] = {}
        self._noted: dict[int, tuple[torch.Tensor, int]] = {}  # gradients as they were added, with their versions
        self._weight = 1
        self._request: Any = None  # of the reduction under way
        self._last: Any = None  # the same request, until the next round begins
        self._waited = 0.0
        self._slots = dict(zip(bucket.members, bucket.layout.slots, strict=True))
        self._table = Table(tuple(s.count for s in bucket.layout.slots), tuple(s.offset for s in bucket.layout.slots))
        orders = {index: memory_order(parameters[index]) for index in bucket.members}
        self._orders = {index: order for index, order in orders.items() if order != tuple(range(len(order)))}
        self._strides = {index: _strides(parameters[index].shape, order) for index, order in orders.items()}
        first = parameters[bucket.members[0]]
        self._facts_of, dtype = facts_of(first.is_cpu, of_gradient=True), getattr(torch, bucket.layout.dtype)
        place = first.is_cpu or first.device
        self._facts = {i: (parameters[i].shape, dtype, place, torch.strided) for i in bucket.members}
        self._allocate(np.dtype("float64" if bucket.layout.dtype == "float64" else "float32"))

    def _allocate(self, dtype: np.dtype[Any]) -> None:
        self._result = ResultBuffer(self.bucket.layout.count, dtype)
        self._reusable = dtype.name == self.bucket.layout.dtype
        self._strides = {index: [step * dtype.itemsize for step in steps] for index, steps in self._strides.items()}
        self.nbytes = self._result.array.nbytes

    # Within a round, in this order.

    def begin(self, weight: int) -> None:
        """Forgets the gradients of the round before.

        Args:
            weight: how often each gradient of this rank counts in the round.
        """
        self.replaced.clear()
        self.packed.clear()
        self._gradients.clear()
        self._noted.clear()
        self.refused = self._last = None
        self._weight = weight

    def add(self, index: int, gradient: torch.Tensor | None) -> None:
        """Notes one parameter's gradient; only while no reduction of the bucket is under way.

        None counts as zeros, and so does every gradient of a rank of weight 0: not even its NaN may reach other ranks.
        A gradient that does not fit its place counts as zeros too, and is noted in `refused`.
        """
        self.packed.add(index)
        if gradient is None or not self._weight:
            self._gradients[index] = None
            return
        if self._facts_of(gradient) != self._facts[index]:
            self.refused, self._gradients[index] = self._misfit(index, gradient), None
            return
        self._gradients[index] = gradient
        self._noted[index] = gradient, gradient._version

    def fits(self, index: int, gradient: torch.Tensor) -> bool:
        """Returns whether a gradient has the shape, the dtype, the layout and the device that the bucket expects."""
        return self._facts_of(gradient) == self._facts[index]

    def _misfit(self, index: int, gradient: torch.Tensor) -> DtypeError:
        name = self._slots[index].name
        if gradient.layout is not torch.strided:
            return DtypeError(f"parameter {name} has a sparse gradient, which cannot be reduced")
        found = f"{gradient.dtype}, shape {tuple(gradient.shape)}, on {gradient.device}"
        shape, dtype, *_ = self._facts[index]
        return DtypeError(f"the gradient of parameter {name} is {found}; expected {dtype}, shape {tuple(shape)}")

    def changed(self) -> bool:
        """Returns whether a gradient has been written or replaced since it was added."""
        parameters = self._parameters
        return any(parameters[i].grad is not one or one._version != seen for i, (one, seen) in self._noted.items())

    def forget(self) -> None:
        """Forgets the gradients that were added, of which none is being reduced, to add those that are there now."""
        self.packed.clear()
        self._noted.clear()

    def add_missing(self, *, again: bool) -> None:
        """Adds the gradients, or None, of all parameters that were not added yet; `again`: of all parameters."""
        if again:
            self.forget()
        for index in self.bucket.members:
            if index not in self.packed:
                self.add(index, self._parameters[index].grad)

    def ready(self) -> bool:
        """Returns whether the bucket is full and can be launched; never blocks."""
        return not self.patient and len(self.packed) == len(self.bucket.members)

    def launch(self, signature: tuple[int, int], total: int) -> None:
        """Starts the mean over all ranks, by weight; all ranks launch their buckets in the same order.

        Args:
            signature: numbers of the round and of the bucket, equal on all ranks.
            total: sum of all ranks' weights.
        """
        self._result.recycle()
        source = self._gather_list(self.bucket.members)
        self._track(self._collectives.start_gathered_sum(signature, source, self._result.view, total))

    def advance(self) -> bool:
        """Moves the reduction on and never blocks; returns whether no reduction is under way any more."""
        if self._request is not None:
            if not self._request.Test():
                return False
            self._request = None
            self._gradients.clear()
            _under_way.discard(self)
        return True

    def wait(self) -> tuple[float, float, float]:
        """Waits until the reduction has completed; returns its seconds of packing, of reducing, and of waiting here."""
        if self._request is not None:
            ranks, before, started = self._collectives.topology, sum(self._last.seconds), time.perf_counter()
            topology.wait_all(ranks, [self._request], "the reduction of gradients", ranks.channel.sequence, self)
            worked = sum(self._last.seconds) - before
            self._waited = max(0.0, time.perf_counter() - started - worked)
            self.advance()
        packing, reducing = self._last.seconds
        return packing, reducing, self._waited

    def finite(self) -> bool:
        """Returns whether all gradients that this rank gave in this round are finite; after `wait`."""
        return self._last is None or bool(self._last.finite)

    def carried(self) -> Sequence[int]:
        """Returns the parameters whose earlier reduced gradient is not in `p.grad` and must be added to the result."""
        return ()

    def write_back(self, trailer: Trailer, *, stepping: bool, made: Set[int], given: Set[int]) -> None:
        """Makes the reduced gradients those of the parameters.

        Args:
            trailer: a parameter that no rank used keeps its gradient (mostly None).
            stepping: whether this rank brought gradients.
            made: parameters that had no gradient before this backward, so that nobody else holds the present one.
            given: parameters whose gradient the user has set to a tensor that may be another model's: it is replaced
                and not written.
        """
        gradients, used, result = {}, trailer.used, None
        for index in self.bucket.members if stepping else ():
            if not used[index]:
                continue
            parameter = self._parameters[index]
            gradient = parameter.grad
            replaceable = gradient is None or index in given or (index in made and not gradient.requires_grad)
            if self._reusable and replaceable:
                result = self._result.lend() if result is None else result
                self.replaced.append(gradient)
                parameter.grad = result.tensor(parameter.shape, self._strides[index], self._slots[index].offset)
                continue
            if gradient is None or index in given:
                dtype = self._facts[index][1]
                gradient = parameter.grad = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            gradients[index] = gradient
        if gradients:
            self._overwrite(gradients)

    # Parts of the above.

    def _gather_list(self, members: Sequence[int | None]) -> GatherList:
        """Returns what the reduction reads: the gradients of `members`, in the order of the bucket's table."""
        addresses, present = list[int](), list[torch.Tensor]()
        for index in members:
            gradient = None if index is None else self._gradients.get(index)
            if index is None or gradient is None:
                addresses.append(0)
                continue
            if index in self._orders or not gradient.is_contiguous():
                gradient = self._in_order(index, gradient).contiguous()
            address = gradient.data_ptr()
            if not address and gradient.numel():
                self.refused = DtypeError(f"the gradient of parameter {self._slots[index].name} has lost its memory")
            addresses.append(address)
            present.append(gradient)
        return GatherList(self._table, addresses, self.bucket.layout.dtype, float(self._weight), present)

    def _track(self, request: Any) -> None:
        self._request = self._last = request
        self._waited = 0.0
        _under_way.add(self)
        self.advance()

    def _in_order(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """Returns a gradient with its dimensions in the parameter's order in memory."""
        order = self._orders.get(index)
        return gradient.detach() if order is None else gradient.detach().permute(order)

    def _overwrite(self, gradients: dict[int, torch.Tensor]) -> None:
        """Overwrites the gradients of some parameters, by index, with the reduced ones."""
        targets = {index: self._in_order(index, gradient) for index, gradient in gradients.items()}
        dense = {index: dense_like(target) for index, target in targets.items()}
        table = self._table
        if len(gradients) < len(self.bucket.members):
            slots = [self._slots[index] for index in dense]
            table = Table(tuple(slot.count for slot in slots), tuple(slot.offset for slot in slots))
        flat = self._result.view
        table.scatter([one.data_ptr() for one in dense.values()], self.bucket.layout.dtype, flat.address, flat.dtype)
        finish_writing(targets, dense)


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Returns the strides under which a tensor's dimensions lie in this order without gaps."""
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= shape[dimension]
    return strides


def dense_like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor itself if its elements lie in order without gaps, or else new memory for as many elements."""
    if tensor.is_contiguous():
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def finish_writing(targets: dict[int, torch.Tensor], dense: dict[int, torch.Tensor]) -> None:
    """Copies results that `dense_like` has put into new memory to their targets; tells autograd of all writes."""
    for index, target in targets.items():
        if dense[index] is not target:
            target.copy_(dense[index])
    torch.autograd.graph.increment_version([one for one in targets.values() if not one.is_inference()])
