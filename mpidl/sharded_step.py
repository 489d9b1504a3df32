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

from mpidl import sharded_state
from mpidl.blocks import share_out
from mpidl.bucket_memory import cut_into_buckets
from mpidl.collectives import Collectives, Shards
from mpidl.errors import ArgumentError
from mpidl.reducer import Reducer
from mpidl.sharded_memory import ShardedBucketMemory
from mpidl.state import Named
from mpidl.statistics import Statistics
from mpidl.step_header import CLIPPING, GATHERING, UPDATING, Header
from mpidl.weights import Weights

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
        self._collectives, self._inner = collectives, optimizer
        self._shards = Shards(collectives)
        try:
            cut = cut_into_buckets(trained, bucket_nbytes)
            buckets = tuple(share_out(bucket, collectives.topology.size) for bucket in cut)
            self.weights = Weights(self._shards, model, trained, buckets)
        except Exception:
            self._shards.free()
            raise
        self._memories = [ShardedBucketMemory(blocks, self.weights, self._shards) for blocks in buckets]
        self._index = {id(p): i for i, p in enumerate(self.weights.parameters)}
        self._reducer: Reducer
        whole = {self._index[id(p)]: s for p, s in optimizer.state.items() if id(p) in self._index}
        for index, state in sharded_state.cut(self.weights, whole).items():
            optimizer.state[self.weights.pieces[index].tensor] = state
        for index in whole:
            del optimizer.state[self.weights.parameters[index]]
        self._held: list[list[torch.Tensor]] | None = None
        self._hook()
        sharded_state.note_shared_out(optimizer)
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
        told = self._told(header, {"dropped": dropped, "groups": self._hyperparameters(header)})
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
        return self._gather()

    def answer(self, header: Header) -> None:
        """Does this rank's part while it waits in `finish()`."""
        told = self._told(header, {})
        if header.doing == UPDATING:
            for group, values in zip(self._inner.param_groups, told["groups"], strict=True):
                group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items()})
            self._update(told["dropped"])
        elif header.doing == CLIPPING:
            self._clip(told["dropped"], told["max_norm"])
        else:
            self._gather()

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
        self._swap_in()
        try:
            self._inner.step()
        finally:
            self._swap_out()
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

    def _gather(self) -> dict[str, Any]:
        pieces = self.weights.pieces
        states = {i: dict(self._inner.state.get(piece.tensor, {})) for i, piece in pieces.items()}
        whole = sharded_state.put_together(self._shards, self.weights, states)
        full = self._inner.state_dict()  # groups, and the state of what is not trained
        del full[sharded_state.KEY]
        for place, parameter in enumerate(self._parameters()):
            index = self._index.get(id(parameter))
            if index is not None:
                full["state"].pop(place, None)
                if index in whole:
                    full["state"][place] = whole[index]
        full["state"] = dict(sorted(full["state"].items()))
        return full

    # The user's optimiser, on pieces.

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _hyperparameters(self, header: Header) -> list[dict[str, Any]] | None:
        if not header.finished:
            return None
        return [
            {k: v for k, v in group.items() if k != "params" and not isinstance(v, torch.Tensor)}
            for group in self._inner.param_groups
        ]

    def _swap_in(self, *_: Any) -> None:
        """Makes the optimiser hold the pieces in place of the parameters."""
        self._swap_out()  # what an exception left behind
        self._held = [group["params"] for group in self._inner.param_groups]
        for group, parameters in zip(self._inner.param_groups, self._held, strict=True):
            group["params"] = [self._standing_for(p) for p in parameters]

    def _swap_out(self, *_: Any) -> None:
        """The reverse; the groups may have been replaced meanwhile."""
        if self._held is not None:
            for group, parameters in zip(self._inner.param_groups, self._held, strict=True):
                group["params"] = parameters
        self._held = None

    def _standing_for(self, parameter: torch.Tensor) -> torch.Tensor:
        index = self._index.get(id(parameter))
        return parameter if index is None else self.weights.pieces[index].tensor

    def zero_grad(self) -> None:
        """Forgets the gradients of the pieces."""
        for piece in self.weights.pieces.values():
            piece.tensor.grad = None

    def _hook(self) -> None:
        """Makes the user's optimiser know of pieces wherever it is used directly; it does so for good."""
        self._inner.register_step_pre_hook(self._refuse_step)
        self._inner.register_state_dict_pre_hook(self._swap_in)
        self._inner.register_state_dict_post_hook(self._after_state_dict)
        self._inner.register_load_state_dict_pre_hook(self._before_load)
        self._inner.register_load_state_dict_post_hook(self._swap_out)

    def _refuse_step(self, *_: Any) -> None:
        if self._held is None:
            raise ArgumentError("step: this optimizer's parameters are shared out: call step() of mpidl.Synchronous")

    def _after_state_dict(self, _: torch.optim.Optimizer, local: dict[str, Any]) -> None:
        local[sharded_state.KEY] = self._own_shard()
        self._swap_out()

    def _own_shard(self) -> dict[str, Any]:
        ranges = [[p.start, p.stop] for _, p in sorted(self.weights.pieces.items())]
        return {"rank": self._collectives.topology.rank, "ranks": self._collectives.topology.size, "ranges": ranges}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a full state, or this rank's part of one.

        Raises:
            ArgumentError: it is another rank's part, or of other pieces; or a tensor has not its parameter's shape.
        """
        try:
            self._inner.load_state_dict(state_dict)
        finally:
            self._swap_out()

    def _before_load(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._swap_out()
        shard = state_dict.get(sharded_state.KEY)
        if shard is None:
            state_dict = self._cut(state_dict)
        elif shard != self._own_shard():
            raise ArgumentError(
                f"load_state_dict: this is the part of rank {shard['rank']} of {shard['ranks']}, cut as its buckets "
                f"were; expected that of rank {self._collectives.topology.rank} of {self._collectives.topology.size}, "
                "or a full_state_dict(), which fits any number of ranks"
            )
        self._swap_in()
        return state_dict

    def _cut(self, full: dict[str, Any]) -> dict[str, Any]:
        places = {place: self._index.get(id(p)) for place, p in enumerate(self._parameters())}
        whole = {
            index: full["state"][place]
            for place, index in places.items()
            if index is not None and place in full["state"]
        }
        pieces = sharded_state.cut(self.weights, whole)
        state = {place: value for place, value in full["state"].items() if places.get(place) is None}
        state |= {place: pieces[index] for place, index in places.items() if index is not None and index in pieces}
        return {**full, "state": state}

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
