"""The user's own optimiser on the pieces that this rank owns, also where the user calls the optimiser directly.

The optimiser's groups hold the user's parameters, which schedulers and hooks expect there; while the optimiser steps,
saves or loads, its groups hold the pieces. The optimiser's state is keyed by pieces.
"""

from __future__ import annotations

from typing import Any

import torch

from mpidl.collectives import Shards
from mpidl.errors import ArgumentError
from mpidl.optim.optimizer import mark_sharded
from mpidl.synchronous.sharded import state as sharded_state
from mpidl.synchronous.sharded.weights import Weights


class PieceOptimizer:
    """An optimiser whose state is cut to pieces, for good.

    Args:
        optimizer: the user's, with a state that is alike on all ranks.
        weights: hold the pieces.
        shards: the ranks' groups and lanes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Weights, shards: Shards) -> None:
        self._inner, self._weights, self._shards = optimizer, weights, shards
        self._rank, self._ranks = shards.ranks.rank, shards.ranks.size
        self._index = {id(p): i for i, p in enumerate(weights.parameters)}
        self._held: list[list[torch.Tensor]] | None = None  # the groups' parameters, while the groups hold the pieces
        whole = {self._index[id(p)]: s for p, s in optimizer.state.items() if id(p) in self._index}
        for index, state in sharded_state.cut(weights, whole).items():
            optimizer.state[weights.pieces[index].tensor] = state
        for index in whole:
            del optimizer.state[weights.parameters[index]]
        mark_sharded(optimizer)
        optimizer.register_step_pre_hook(self._refuse_step)
        optimizer.register_state_dict_pre_hook(self._swap_in)
        optimizer.register_state_dict_post_hook(self._after_state_dict)
        optimizer.register_load_state_dict_pre_hook(self._before_load)
        optimizer.register_load_state_dict_post_hook(self._swap_out)

    def step(self) -> None:
        """Takes a step on this rank's pieces."""
        self._swap_in()
        try:
            self._inner.step()
        finally:
            self._swap_out()

    def full_state_dict(self) -> dict[str, Any]:
        """Returns the state that the optimiser would have without pieces; a collective."""
        pieces = self._weights.pieces
        states = {i: dict(self._inner.state.get(piece.tensor, {})) for i, piece in pieces.items()}
        whole = sharded_state.put_together(self._shards, self._weights, states)
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a full state, or this rank's part of one.

        Raises:
            ArgumentError: the state is another rank's part, or one of other pieces; or a tensor has not its parameter's
                shape.
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
                f"were; expected that of rank {self._rank} of {self._ranks}, "
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
        pieces = sharded_state.cut(self._weights, whole)
        state = {place: value for place, value in full["state"].items() if places.get(place) is None}
        state |= {place: pieces[index] for place, index in places.items() if index is not None and index in pieces}
        return {**full, "state": state}

    def _own_shard(self) -> dict[str, Any]:
        ranges = [[p.start, p.stop] for _, p in sorted(self._weights.pieces.items())]
        return {"rank": self._rank, "ranks": self._ranks, "ranges": ranges}

    def _refuse_step(self, *_: Any) -> None:
        if self._held is None:
            raise ArgumentError("step: this optimizer's parameters are sharded: call step() of mpidl.Synchronous")

    def _after_state_dict(self, _: torch.optim.Optimizer, local: dict[str, Any]) -> None:
        local[sharded_state.KEY] = self._own_shard()
        self._swap_out()

    # Whether the groups hold parameters or pieces.

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _swap_in(self, *_: Any) -> None:
        """Makes the optimiser hold the pieces in place of the parameters."""
        self._swap_out()  # an exception may have left pieces in the groups
        self._held = [group["params"] for group in self._inner.param_groups]
        for group, parameters in zip(self._inner.param_groups, self._held, strict=True):
            group["params"] = [self._standing_for(p) for p in parameters]

    def _swap_out(self, *_: Any) -> None:
        """Makes the optimiser hold the parameters again; the groups may have been replaced meanwhile."""
        if self._held is not None:
            for group, parameters in zip(self._inner.param_groups, self._held, strict=True):
                group["params"] = parameters
        self._held = None

    def _standing_for(self, parameter: torch.Tensor) -> torch.Tensor:
        index = self._index.get(id(parameter))
        return parameter if index is None else self._weights.pieces[index].tensor
