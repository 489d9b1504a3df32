"""The sharded step: the user's own optimiser on the pieces of parameters that this rank owns (ZeRO; Rajbhandari 2020).

What ranks do together outside backward begins with a header, as backward does: nobody writes weights before all have
come, a parameter that has left the shared memory is refused on every rank, and a rank in `finish()` does its part.
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
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.bucket import cut_into_buckets
from mpidl.synchronous.reduction.header import CLIPPING, GATHERING, UPDATING, Header
from mpidl.synchronous.reduction.reducer import Reducer
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.sharded.bucket import ShardedBucketMemory
from mpidl.synchronous.sharded.optimizer import PieceOptimizer
from mpidl.synchronous.sharded.partition import share_out
from mpidl.synchronous.sharded.weights import Weights

_weights: WeakKeyDictionary[torch.nn.Module, Weights] = WeakKeyDictionary()


class Sharded:
    """The weights, the pieces and the optimiser of one `mpidl.Synchronous(shard=True)`; making it is a collective.

    Args:
        collectives: of all ranks.
        optimizer: the user's; its parameters and its state are alike on all ranks.
        model: whose parameters they are.
        trained: those that are trained.
        bucket_nbytes: size of a bucket in bytes.
    """

    def __init__(
        self,
        collectives: Collectives,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        trained: Named,
        bucket_nbytes: int,
    ) -> None:
        self._collectives = collectives
        self._shards = Shards(collectives)
        try:
            cut = cut_into_buckets(trained, bucket_nbytes)
            buckets = tuple(share_out(bucket, collectives.topology.size) for bucket in cut)
            self.weights = Weights(self._shards, model, trained, buckets)
        except Exception:
            self._shards.free()
            raise
        self._memories = [ShardedBucketMemory(blocks, self.weights, self._shards) for blocks in buckets]
        self._optimizer = PieceOptimizer(optimizer, self.weights, self._shards)
        self._reducer: Reducer
        _weights[model] = self.weights

    def reducer(self, named: Named, bucket_nbytes: int, statistics: Statistics) -> Reducer:
        """Returns the reducer that gives each rank the gradients of its pieces."""
        self._reducer = Reducer(
            self._collectives, named, bucket_nbytes, statistics, memories=self._memories, watcher=self.weights
        )
        return self._reducer

    # What all ranks do together. A rank in finish() learns from the others what to do it with.

    def step(self) -> None:
        """Takes the optimiser's step on this rank's pieces, and makes the result everybody's weights."""
        dropped, trouble = self._gradients()
        header = self._reducer.announce(UPDATING, trouble)
        mine = {"dropped": dropped, "groups": self._optimizer.hyperparameters() if header.finished else None}
        told = self._told(header, mine)
        self._update(told["dropped"])

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients of all pieces of all ranks; returns their norm before."""
        dropped, trouble = self._gradients()
        header = self._reducer.announce(CLIPPING, trouble)
        told = self._told(header, {"dropped": dropped, "max_norm": float(max_norm)})
        return self._clip(told["dropped"], told["max_norm"])

    def full_state_dict(self) -> dict[str, Any]:
        """Returns, on every rank, the `state_dict()` of the same optimiser without shards."""
        self._told(self._reducer.announce(GATHERING), {})
        return self._optimizer.full_state_dict()

    def answer(self, header: Header) -> None:
        """Does this rank's part while it waits in `finish()`."""
        told = self._told(header, {})
        if header.doing == UPDATING:
            self._optimizer.take_hyperparameters(told["groups"])
            self._update(told["dropped"])
        elif header.doing == CLIPPING:
            self._clip(told["dropped"], told["max_norm"])
        else:
            self._optimizer.full_state_dict()

    def _told(self, header: Header, mine: dict[str, Any]) -> dict[str, Any]:
        """Returns what the first rank that is not in `finish()` says, if some rank is."""
        if not header.finished:
            return mine
        ranks = self._collectives.topology
        texts = ranks.gather_bytes(json.dumps(mine).encode(), "answering for a rank in finish()")
        told: dict[str, Any] = json.loads(next(t for r, t in enumerate(texts) if r not in header.finished))
        return told

    def _gradients(self) -> tuple[list[int], int]:
        """Returns the parameters that have no gradient, and the trouble that one has a strange gradient."""
        dropped, trouble = [], 0
        for memory in self._memories:
            for index in memory.bucket.members:
                there = memory.state_of(index)
                if there is None:
                    trouble = self.weights.replaced_gradient(index)
                elif not there:
                    dropped.append(index)
        return dropped, trouble

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
    """Lets one rank write where several share the parameters of `model`, under `mpidl.Synchronous(shard=True)`.

    `with mpidl.exclusive(model) as mine:` waits until all ranks that share the weights have come, and at its end until
    the one that writes has written: do it in `if mine:`. Parameters that nobody shares are everybody's own to write:
    then `mine` is True on every rank. A collective under `shard=True`.

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
