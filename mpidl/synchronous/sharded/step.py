"""The sharded step: the user's own optimiser on the pieces of parameters that this rank owns (ZeRO; Rajbhandari 2020).

What the ranks do together outside backward begins with a header, as backward does: no rank writes weights before all
ranks have come, a parameter that has left the shared memory is refused on every rank, and a rank in `finish()` does its
part of the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from mpidl.collectives import Collectives, Shards
from mpidl.mpi import runtime
from mpidl.optim import models, state
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.buckets import cut_into_buckets
from mpidl.synchronous.reduction.header import CLIPPING, GATHERING, NORMING, UNSCALING, UPDATING, Header
from mpidl.synchronous.reduction.reducer import Reducer
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.sharded.bucket import ShardedBucketMemory
from mpidl.synchronous.sharded.mark import Change
from mpidl.synchronous.sharded.optimizer import PieceOptimizer
from mpidl.synchronous.sharded.partition import partition_bucket
from mpidl.synchronous.sharded.weights import Weights

_shared: WeakSet[Weights] = WeakSet()


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
        self._known_norms: dict[float, dict[int, float]] = {}
        self._changes: list[Change] = []  # since the last announcement
        try:
            cut = cut_into_buckets(trained, bucket_nbytes)
            partitions = tuple(partition_bucket(bucket, collectives.topology.size) for bucket in cut)
            self.weights = Weights(self._shards, model, trained, partitions)
        except Exception:
            self._shards.free()
            raise
        self._memories = [
            ShardedBucketMemory(partition, self.weights, self._shards, collectives, self) for partition in partitions
        ]
        self._optimizer = PieceOptimizer(optimizer, self.weights, self._shards)
        self._reducer: Reducer
        _shared.add(self.weights)

    def reducer(self, named: Named, bucket_nbytes: int, statistics: Statistics, **seen: Any) -> Reducer:
        """Returns the reducer that gives each rank the gradients of its pieces; `seen` are its further arguments."""
        self._reducer = Reducer(
            self._collectives, named, bucket_nbytes, statistics, memories=self._memories, check=self.weights, **seen
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
        for change in arguments["changes"]:
            self._apply(Change(*change))
        if header.doing == UPDATING:
            state.take_hyperparameters(self._inner, arguments["groups"])
            self._update(arguments["dropped"])
        elif header.doing == CLIPPING:
            self._clip(arguments["dropped"], arguments["max_norm"])
        elif header.doing == NORMING:
            self._norms(arguments["dropped"], float(arguments["order"]))
        elif header.doing == UNSCALING:
            self._unscale(arguments["indices"], arguments["scale"])
        else:
            self._optimizer.full_state_dict()

    def _arguments(self, header: Header, mine: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments: those of the first rank outside `finish()`, where some rank is in `finish()`."""
        changes, self._changes = self._changes, []
        if not header.finished:
            return mine
        ranks = self._collectives.topology
        mine["changes"] = changes
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
        norm = float(self._gathered(np.array([sum(squares)]), "clipping").sum()) ** 0.5
        self.changed()
        scale = min(1.0, max_norm / (norm + 1e-6)) if not math.isnan(norm) else norm
        if scale != 1.0:
            for gradient in gradients:
                gradient.mul_(scale)
        return torch.tensor(norm, dtype=self.weights.parameters[0].dtype)

    # What marks stand for, see `mark.Parts`.

    def name(self, index: int) -> str:
        """Returns a parameter's name."""
        return self.weights.names[index]

    def change(self, change: Change) -> None:
        """Changes gradients, on this rank its own parts; ranks in `finish()` follow with the next announcement."""
        self.changed()
        self._changes.append(change)
        self._apply(change)

    def _apply(self, change: Change) -> None:
        gradients = self._present(change.indices)
        if gradients:
            change.apply(gradients)

    def norms(self, order: float) -> dict[int, float]:
        """Returns the norms of the gradients of all parameters, by index; a collective if gradients have changed."""
        if order not in self._known_norms:
            dropped, error = self._gradients()
            header = self._reducer.announce(NORMING, error)
            arguments = self._arguments(header, {"dropped": dropped, "order": str(order)})
            self._known_norms[order] = self._norms(arguments["dropped"], order)
        return self._known_norms[order]

    def _norms(self, dropped: list[int], order: float) -> dict[int, float]:
        self._drop(dropped)
        beyond = abs(order) == math.inf  # the norm is the largest or the smallest magnitude, otherwise a sum's root
        mine = np.full(len(self.weights.parameters), -order if beyond and order < 0 else 0.0)
        for index, piece in self.weights.pieces.items():
            if piece.owned and piece.tensor.grad is not None:
                norm = float(torch.linalg.vector_norm(piece.tensor.grad, order, dtype=_wide(piece.tensor)))
                mine[index] = norm if beyond or order == 0 else norm**order
        everyone = self._gathered(mine, "norms of gradients")
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            found = (everyone.max(0) if order > 0 else everyone.min(0)) if beyond else everyone.sum(0)
            found = found if beyond or order == 0 else found ** (1 / order)
        return dict(enumerate(found.tolist()))

    def changed(self) -> None:
        """Forgets the norms of gradients that have changed; alike on all ranks."""
        self._known_norms.clear()

    def unscale(self, indices: Sequence[int], scale: float) -> bool:
        """Multiplies gradients; returns whether some rank has found one that was not finite. A collective."""
        header = self._reducer.announce(UNSCALING)
        arguments = self._arguments(header, {"indices": list(indices), "scale": scale})
        return self._unscale(arguments["indices"], arguments["scale"])

    def _unscale(self, indices: Sequence[int], scale: float) -> bool:
        self.changed()
        found, gradients = torch.zeros(()), self._present(indices)
        if gradients:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.tensor(scale))
        return bool(self._gathered(np.array([float(found)]), "looking for infinities").any())

    def _present(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Returns this rank's parts of the gradients of some parameters."""
        pieces = (self.weights.pieces[index] for index in indices)
        return [g for piece in pieces if piece.owned and (g := piece.tensor.grad) is not None]

    def _gathered(self, mine: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
        """Returns the numbers of all ranks; a collective."""
        ranks = self._collectives.topology
        everyone = np.empty((ranks.size, mine.size))
        sequence = ranks.begin()
        ranks.wait(self._collectives.start_words_gather(mine, everyone), what, sequence)
        return everyone

    def zero_grad(self) -> None:
        """Forgets the gradients of the pieces."""
        self.changed()
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


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


@contextmanager
def exclusive(model: models.Model) -> Iterator[bool]:
    """Lets one rank write parameters of `model` that several ranks share under `mpidl.Synchronous(shard=True)`.

    Write in `with mpidl.exclusive(model) as mine:`, and there under `if mine:`. The block begins when all ranks that
    share the weights have come to it, and ends when the writing rank has written. On a model whose parameters no rank
    shares, `mine` is True on every rank and nothing waits. A collective under `shard=True`.

    Args:
        model: the one that the optimiser was given, or a part of it: a module, or a list of modules and parameters.
    """
    runtime.refuse_forked()
    weights = _weights_of(models.together(model))
    if weights is None:
        yield True
        return
    weights.barrier("exclusive")
    try:
        yield weights.writes
    finally:
        weights.note_written()
        weights.barrier("exclusive")


def _weights_of(model: torch.nn.Module) -> Weights | None:
    """Returns the shared weights that hold a parameter of the model, if any do."""
    parameters = {id(parameter) for parameter in model.parameters()}
    found = (weights for weights in _shared if not weights.released)
    return next((weights for weights in found if any(id(p) in parameters for p in weights.parameters)), None)
