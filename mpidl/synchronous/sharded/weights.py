"""Parameters that the ranks of a node share: one copy of the weights, and the pieces of it that each rank owns.

Parameters become views of shared memory and stay the user's own objects. A user who replaces such a view, or writes to
the view on every rank, would train other weights than the other ranks do: `check` finds such a change before each step,
and `describe_error` words the error for all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mpidl.arrays.layout import ITEMSIZE
from mpidl.collectives import Shards
from mpidl.errors import ArgumentError
from mpidl.optim.state import Named, memory_order
from mpidl.synchronous.sharded.partition import Partition

_LEFT, _WRITTEN, _GRADIENT = 0, 1, 2
_ERRORS = {
    _LEFT: (
        "parameter {name} has left the memory that the ranks share (model.double(), load_state_dict(assign=True), "
        "share_memory() and `p.data = ...` do that): make such changes before mpidl.Synchronous(shard=True) or after "
        "its finish()"
    ),
    _WRITTEN: (
        "parameter {name} was written in place, by every rank on one memory: write in "
        "`with mpidl.exclusive(model) as mine:`, and only where `mine` is True; after a load_state_dict() of the same "
        "weights on all ranks call broadcast_parameters() on all of them"
    ),
    _GRADIENT: (
        "the gradient of parameter {name} was replaced: with shard=True each rank has the gradients of its own pieces "
        "only, and p.grad stands for them; set it to None to leave the parameter out"
    ),
}


@dataclass
class Piece:
    """What one rank owns of a parameter: elements `start` to `stop` in the parameter's order in memory.

    Attributes:
        tensor: a flat view of the weights, whose `grad` is the reduced gradient.
    """

    start: int
    stop: int
    tensor: torch.Tensor

    @property
    def owned(self) -> bool:
        """Whether the piece has elements, on which this rank takes the optimiser's step."""
        return self.stop > self.start


class Weights:
    """The trained parameters of a model in memory of their node; making it is a collective.

    Args:
        shards: the ranks' groups and lanes; gives the number of this rank's block.
        model: the model of the parameters.
        named: the trained parameters; alike on all ranks, in their values too.
        partitions: of the buckets, by index in `named`; the weights lie in memory in this order.
    """

    def __init__(self, shards: Shards, model: torch.nn.Module, named: Named, partitions: tuple[Partition, ...]) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.orders = [memory_order(p) for p in self.parameters]
        self.pieces: dict[int, Piece] = {}
        self._shards, self.partitions = shards, partitions
        self._memory: Any = shards.memory(max(64, sum(partition.nbytes for partition in partitions)))
        self._starts, at = list[int](), 0
        for partition in partitions:
            self._starts.append(at)
            at += partition.nbytes
        views = {index: view for number in range(len(partitions)) for index, view in self._fill(number).items()}
        shards.share_weights(self._memory, self._places)
        for index, parameter in enumerate(self.parameters):
            parameter.data = views[index]
        self._expected = [_seen(parameter) for parameter in self.parameters]
        self._versions = [parameter._version for parameter in self.parameters]
        trained = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._registered = [
            (module._parameters, name, parameter, trained[id(parameter)])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in trained
        ]

    @property
    def _places(self) -> list[tuple[int, int]]:
        return [(start, p.nbytes // p.number) for start, p in zip(self._starts, self.partitions, strict=True)]

    def _fill(self, number: int) -> dict[int, torch.Tensor]:
        """Copies this rank's pieces of one bucket into the shared memory; returns the parameters' views of it."""
        partition, views = self.partitions[number], {}
        for index, slot in partition.slots.items():
            parameter, order = self.parameters[index].detach(), self.orders[index]
            start, stop = partition.part(index, self._shards.block)
            piece = self._flat(number, parameter.dtype, slot.offset + start, stop - start)
            own = parameter.permute(order).reshape(-1)
            piece.copy_(own[start:stop])
            self.pieces[index] = Piece(start, stop, piece)
            views[index] = self.in_shape(index, self._flat(number, parameter.dtype, slot.offset, slot.count))
        return views

    def _flat(self, number: int, dtype: torch.dtype, offset: int, count: int) -> torch.Tensor:
        """Returns a view of the weights with a storage of its own, so that saving one parameter does not save all."""
        if not count:
            return torch.empty(0, dtype=dtype)
        at = self._starts[number] + offset * ITEMSIZE[self.partitions[number].bucket.layout.dtype]
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=at)

    def in_shape(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        """Returns a view, in the parameter's shape, of all its elements in the parameter's order in memory."""
        order, shape = self.orders[index], self.parameters[index].shape
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        return flat.view([shape[d] for d in order]).permute(inverse)

    def in_memory_order(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor's elements in the parameter's order in memory; a copy unless they lie in that order."""
        return tensor.detach().permute(self.orders[index]).reshape(-1)

    def publish(self) -> None:
        """Gives the weights that each rank has written to its own pieces to all ranks; a collective."""
        self._shards.share_weights(self._memory, self._places)
        self.note_written()

    def note_written(self) -> None:
        """Tells autograd that the weights have changed, and lets `check` accept the change."""
        live = [parameter for parameter in self.parameters if not parameter.is_inference()]
        torch.autograd.graph.increment_version(live)
        self._versions = [parameter._version for parameter in self.parameters]

    @contextmanager
    def own_memory(self) -> Iterator[None]:
        """Gives every parameter memory of its own meanwhile; its content then becomes that of the shared memory.

        All ranks that share the memory must hold the same content at the end; one of them writes it.
        """
        shared = [parameter.data for parameter in self.parameters]
        for parameter, view in zip(self.parameters, shared, strict=True):
            parameter.data = view.clone(memory_format=torch.preserve_format)
        try:
            yield
            self.barrier("copying the weights")  # all have read them
            if self.writes:
                for parameter, view in zip(self.parameters, shared, strict=True):
                    view.copy_(parameter.data)
        finally:
            for parameter, view in zip(self.parameters, shared, strict=True):
                parameter.data = view
        self.note_written()
        self.barrier("copying the weights")

    def barrier(self, what: str) -> None:
        """Waits until all ranks that share this copy of the weights have come."""
        self._shards.barrier(what)

    @property
    def writes(self) -> bool:
        """Whether this rank writes for all ranks that share this copy of the weights."""
        return self._shards.writes

    def check(self, *, finishing: bool = False) -> int:
        """Returns 0, or the number of an error, which `describe_error` words on every rank.

        Args:
            finishing: a parameter may have left the shared memory.
        """
        for index, parameter in enumerate(self.parameters):
            if _seen(parameter) != self._expected[index]:
                if not finishing:
                    return 1 + 3 * index + _LEFT
            elif parameter._version != self._versions[index]:
                return 1 + 3 * index + _WRITTEN
        for registered, name, trained, index in () if finishing else self._registered:
            if registered.get(name) is not trained:
                return 1 + 3 * index + _LEFT
        return 0

    @staticmethod
    def replaced_gradient(index: int) -> int:
        """Returns the number of the error that the user has replaced a parameter's gradient."""
        return 1 + 3 * index + _GRADIENT

    def describe_error(self, number: int) -> ArgumentError:
        """Returns the error of a number from `check` or `replaced_gradient`."""
        index, kind = divmod(number - 1, 3)
        return ArgumentError(_ERRORS[kind].format(name=self.names[index]))

    @property
    def released(self) -> bool:
        """Whether every parameter has memory of its own again."""
        return self._memory is None

    def release(self) -> None:
        """Gives every parameter memory of its own; harmless the second time."""
        if self._memory is None:
            return
        for parameter, expected in zip(self.parameters, self._expected, strict=True):
            if _seen(parameter) == expected:  # a parameter that has left has memory of its own
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        self._expected = [_seen(parameter) for parameter in self.parameters]
        for piece in self.pieces.values():
            piece.tensor.grad = None
            piece.tensor.data = piece.tensor.new_empty(0)
        self._memory = None


def _seen(parameter: torch.Tensor) -> tuple[Any, ...]:
    return parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
