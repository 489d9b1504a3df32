"""Parameters that the ranks of a node share: one copy of the weights, and the pieces of it that each rank owns.

Parameters become views of shared memory and stay the user's own objects. Whoever replaces such a view, or writes to it
on every rank, would train something else than the others do: `trouble` finds that out, and `explain` says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpidl.arrays.layout import ITEMSIZE
from mpidl.collectives import Shards
from mpidl.errors import ArgumentError
from mpidl.optim.state import Named, memory_order
from mpidl.synchronous.sharded.partition import Partition

_LEFT, _WRITTEN, _GRADIENT = 0, 1, 2
_WHY = {
    _LEFT: (
        "parameter {name} has left the memory that the ranks share (model.double(), load_state_dict(assign=True), "
        "share_memory() and `p.data = ...` do that): make such changes before mpidl.Synchronous(shard=True) or after "
        "its finish()"
    ),
    _WRITTEN: (
        "parameter {name} was written in place, by every rank on one memory: write in "
        "`with mpidl.exclusive(model) as mine:`, and only where `mine` is True"
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
        tensor: a flat view of the weights; the reduced gradient is its `grad`.
    """

    start: int
    stop: int
    tensor: torch.Tensor

    @property
    def owned(self) -> bool:
        """Whether this rank takes the optimiser's step on it; of a parameter without elements all do."""
        return self.stop > self.start


class Weights:
    """The trained parameters of a model in memory of their node; making it is a collective.

    Args:
        shards: who owns what.
        model: whose parameters they are.
        named: the trained parameters; alike on all ranks, in their values too.
        buckets: how they lie, by index in `named`.
    """

    def __init__(self, shards: Shards, model: torch.nn.Module, named: Named, buckets: tuple[Partition, ...]) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.orders = [memory_order(p) for p in self.parameters]
        self.pieces: dict[int, Piece] = {}
        self._shards, self.buckets = shards, buckets
        self._memory: Any = shards.memory(max(64, sum(blocks.nbytes for blocks in buckets)))
        self._starts, at = list[int](), 0
        for blocks in buckets:
            self._starts.append(at)
            at += blocks.nbytes
        views = {index: view for number in range(len(buckets)) for index, view in self._fill(number).items()}
        shards.share_weights(self._memory, self._places)
        for index, parameter in enumerate(self.parameters):
            parameter.data = views[index]
        self._expected = [_seen(parameter) for parameter in self.parameters]
        self._versions = [parameter._version for parameter in self.parameters]
        trained = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._homes = [
            (module._parameters, name, parameter, trained[id(parameter)])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in trained
        ]

    @property
    def _places(self) -> list[tuple[int, int]]:
        return [(start, b.nbytes // b.number) for start, b in zip(self._starts, self.buckets, strict=True)]

    def _fill(self, number: int) -> dict[int, torch.Tensor]:
        """Copies this rank's pieces of one bucket into the shared memory; returns the parameters' views of it."""
        blocks, views = self.buckets[number], {}
        for index, slot in blocks.slots.items():
            parameter, order = self.parameters[index].detach(), self.orders[index]
            start, stop = blocks.part(index, self._shards.block)
            piece = self._flat(number, parameter.dtype, slot.offset + start, stop - start)
            own = parameter.permute(order).reshape(-1)
            piece.copy_(own[start:stop])
            self.pieces[index] = Piece(start, stop, piece)
            views[index] = self.in_shape(index, self._flat(number, parameter.dtype, slot.offset, slot.count))
        return views

    def _flat(self, number: int, dtype: torch.dtype, offset: int, count: int) -> torch.Tensor:
        """A view with a storage of its own, so that saving one parameter does not save all."""
        if not count:
            return torch.empty(0, dtype=dtype)
        at = self._starts[number] + offset * ITEMSIZE[self.buckets[number].bucket.layout.dtype]
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=at)

    def in_shape(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        """Views all elements of a parameter, in its order in memory, in its shape."""
        order, shape = self.orders[index], self.parameters[index].shape
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        return flat.view([shape[d] for d in order]).permute(inverse)

    def in_memory_order(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """The reverse of `in_shape`; a copy unless the tensor lies in that order."""
        return tensor.detach().permute(self.orders[index]).reshape(-1)

    def publish(self) -> None:
        """Makes what every rank has written to its own pieces everybody's weights; a collective."""
        self._shards.share_weights(self._memory, self._places)
        self.note_written()

    def note_written(self) -> None:
        """Tells autograd that the weights have changed, and takes that for right."""
        live = [parameter for parameter in self.parameters if not parameter.is_inference()]
        torch.autograd.graph.increment_version(live)
        self._versions = [parameter._version for parameter in self.parameters]

    def barrier(self, what: str) -> None:
        """Returns when all ranks that share this copy have come."""
        self._shards.barrier(what)

    @property
    def writes(self) -> bool:
        """Whether this rank is the one that writes for all that share this copy."""
        return self._shards.writes

    def trouble(self, *, finishing: bool = False) -> int:
        """Returns 0, or a number that says what is wrong with which parameter; `explain` knows it on every rank.

        Args:
            finishing: a parameter may have left.
        """
        for index, parameter in enumerate(self.parameters):
            if _seen(parameter) != self._expected[index]:
                if not finishing:
                    return 1 + 3 * index + _LEFT
            elif parameter._version != self._versions[index]:
                return 1 + 3 * index + _WRITTEN
        for home, name, trained, index in () if finishing else self._homes:
            if home.get(name) is not trained:
                return 1 + 3 * index + _LEFT
        return 0

    @staticmethod
    def replaced_gradient(index: int) -> int:
        """Returns the number of a gradient that is not mpidl's."""
        return 1 + 3 * index + _GRADIENT

    def explain(self, trouble: int) -> ArgumentError:
        """Returns what is wrong."""
        index, kind = divmod(trouble - 1, 3)
        return ArgumentError(_WHY[kind].format(name=self.names[index]))

    @property
    def released(self) -> bool:
        """Whether every parameter has memory of its own again."""
        return self._memory is None

    def release(self) -> None:
        """Gives every parameter memory of its own; harmless the second time."""
        if self._memory is None:
            return
        for parameter, expected in zip(self.parameters, self._expected, strict=True):
            if _seen(parameter) == expected:  # whoever has left has memory of its own
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        self._expected = [_seen(parameter) for parameter in self.parameters]
        for piece in self.pieces.values():
            piece.tensor.grad = None
            piece.tensor.data = piece.tensor.new_empty(0)
        self._memory = None


def _seen(parameter: torch.Tensor) -> tuple[Any, ...]:
    return parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
