"""The sharded step: the user's own optimiser on the pieces of parameters that this rank owns (ZeRO; Rajbhandari 2020).

What the ranks do together outside backward begins with a header, as backward does: no rank writes weights before all
ranks have come, a parameter that has left the shared memory is refused on every rank, and a rank in `finish()` does its
part of the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mpidl.collectives import Collectives, Shards
from mpidl.optim import state
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.buckets import cut_into_buckets
from mpidl.synchronous.reduction.header import CLIPPING, GATHERING, UPDATING, Header
from mpidl.synchronous.reduction.reducer import Reducer
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.sharded.bucket import ShardedBucketMemory
from mpidl.synchronous.sharded.optimizer import PieceOptimizer
from mpidl.synchronous.sharded.partition import partition_bucket
from mpidl.synchronous.sharded.weights import Weights

_weights: WeakKeyDictionary[torch.nn.Module, Weights] = WeakKeyDictionary()


class Sharded:
    """The weights, the pieces and the optimiser of one `mpidl.Synchronous(shard=True)`; making it is a collective.

    Args:
        collectives: of all ranks.
        optimizer: the user's; its parameters and its state are alike on all ranks.
        model: the model of the optimiser's parameters.
        trained: the parameters to train, with their names.
        bucket_nbytes: largest size of a bucket in bytes.
    """

    def __init__(
        self,
        collectives: Collectives,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        trained: Named,
        bucket_nbytes: int,
    ) -> None:
        self._collectives, self._inner = collectives, optimizer
        self._shards = Shards(collectives)
        try:
            cut = cut_into_buckets(trained, bucket_nbytes)
            partitions = tuple(partition_bucket(bucket, collectives.topology.size) for bucket in cut)
            self.weights = Weights(self._shards, model, trained, partitions)
        except Exception:
            self._shards.free()
            raise
        self._memories = [
            ShardedBucketMemory(partition, self.weights, self._shards, collectives) for partition in partitions
        ]
        self._optimizer = PieceOptimizer(optimizer, self.weights, self._shards)
        self._reducer: Reducer
        _weights[model] = self.weights

    def reducer(self, named: Named, bucket_nbytes: int, statistics: Statistics) -> Reducer:
        """Returns the reducer that gives each rank the gradients of its pieces."""
        self._reducer = Reducer(
            self._collectives, named, bucket_nbytes, statistics, memories=self._memories, check=self.weights
        )
        return self._reducer

    # What all ranks do together. A rank in `finish()` gets the arguments of its part from another rank.

    def step(self) -> None:
        """Takes the optimiser's step on this rank's pieces, and gives the result to all ranks."""
        dropped, error = self._gradients()
        header = self._reducer.announce(UPDATING, error)
        mine = {"dropped": dropped, "groups": state.hyperparameters(self._inner) if header.finished else None}
        arguments = self._arguments(header, mine)
        self._update(arguments["dropped"])

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients of all pieces of all ranks; returns the norm of all of them before."""
        dropped, error = self._gradients()
        header = self._reducer.announce(CLIPPING, error)
        arguments = self._arguments(header, {"dropped": dropped, "max_norm": float(max_norm)})
        return self._clip(arguments["dropped"], arguments["max_norm"])

    def full_state_dict(self) -> dict[str, Any]:
        """Returns, on every rank, the `state_dict()` of the same optimiser without shards."""
        self._arguments(self._reducer.announce(GATHERING), {})
        return self._optimizer.full_state_dict()

    def answer(self, header: Header) -> None:
        """Does this rank's part of what the other ranks do, while this rank is in `finish()`."""
        arguments = self._arguments(header, {})
        if header.doing == UPDATING:
            state.take_hyperparameters(self._inner, arguments["groups"])
            self._update(arguments["dropped"])
        elif header.doing == CLIPPING:
            self._clip(arguments["dropped"], arguments["max_norm"])
        else:
            self._optimizer.full_state_dict()

    def _arguments(self, header: Header, mine: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments: those of the first rank outside `finish()`, where some rank is in `finish()`."""
        if not header.finished:
            return mine
        ranks = self._collectives.topology
        texts = ranks.gather_bytes(json.dumps(mine).encode(), "answering for a rank in finish()")
        arguments: dict[str, Any] = json.loads(next(t for r, t in enumerate(texts) if r not in header.finished))
        return arguments

    def _gradients(self) -> tuple[list[int], int]:
        """Returns the parameters that have no gradient, and the number of an error if a gradient was replaced, or 0."""
        dropped, error = [], 0
        for memory in self._memories:
            for index in memory.bucket.members:
                reduced = memory.reduced(index)
                if reduced is None:
                    error = self.weights.replaced_gradient(index)
                elif not reduced:
                    dropped.append(index)
        return dropped, error

    def _drop(self, dropped: list[int]) -> None:
        for index in dropped:
            self.weights.pieces[index].tensor.grad = None

    def _update(self, dropped: list[int]) -> None:
        self._drop(dropped)
        self._optimizer.step()
        self.weights.publish()

    def _clip(self, dropped: list[int], max_norm: float) -> torch.Tensor:
        self._drop(dropped)
        gradients = [
            g for piece in self.weights.pieces.values() if (g := piece.tensor.grad) is not None and piece.owned
        ]
        squares = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients]
        ranks = self._collectives.topology
        everyone = np.empty((ranks.size, 1))
        sequence = ranks.begin()
        ranks.wait(self._collectives.start_words_gather(np.array([sum(squares)]), everyone), "clipping", sequence)
        norm = float(everyone.sum()) ** 0.5
        scale = min(1.0, max_norm / (norm + 1e-6)) if not math.isnan(norm) else norm
        if scale != 1.0:
            for gradient in gradients:
                gradient.mul_(scale)
        return torch.tensor(norm, dtype=self.weights.parameters[0].dtype)

    def zero_grad(self) -> None:
        """Forgets the gradients of the pieces."""
        for piece in self.weights.pieces.values():
            piece.tensor.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a full state, or this rank's part of one."""
        self._optimizer.load_state_dict(state_dict)

    # The end.

    def release(self) -> None:
        """Gives every parameter memory of its own; no collective."""
        for memory in self._memories:
            memory.close()
        self.weights.release()

    def free(self) -> None:
        """Gives communicators back; a collective."""
        self._shards.free()


@contextmanager
def exclusive(model: torch.nn.Module) -> Iterator[bool]:
    """Lets one rank write parameters of `model` that several ranks share under `mpidl.Synchronous(shard=True)`.

    Write in `with mpidl.exclusive(model) as mine:`, and there under `if mine:`. The block begins when all ranks that
    share the weights have come to it, and ends when the writing rank has written. On a model whose parameters no rank
    shares, `mine` is True on every rank and nothing waits. A collective under `shard=True`.

    Args:
        model: the one that the optimiser was given.
    """
    weights = _weights.get(model)
    if weights is None or weights.released:
        yield True
        return
    weights.barrier("exclusive")
    try:
        yield weights.writes
    finally:
        weights.note_written()
        weights.barrier("exclusive")
