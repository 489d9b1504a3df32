"""The optimiser's state under `shard=True`: which optimisers can be sharded, how state is cut and put together.

`state_dict()` keeps torch's form with this rank's pieces in it, and says under "shard" whose they are. A full one is
what the unsharded optimiser would have.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from mpidl.collectives import Shards
from mpidl.errors import ArgumentError, DtypeError
from mpidl.state import Named, dtype_name
from mpidl.weights import Weights

KEY = "shard"
_ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "ASGD",
    "Rprop",
)
_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})  # one for a whole parameter
_NOT = {
    "LBFGS": "its direction comes from inner products over all parameters",
    "Muon": "it orthogonalises whole matrices",
    "Adafactor": "it keeps sums over rows and columns",
    "SparseAdam": "it takes sparse gradients",
}

States = dict[int, dict[str, Any]]  # by index of a trained parameter


def refuse(optimizer: torch.optim.Optimizer, trained: Named) -> None:
    """Refuses what cannot be sharded.

    Raises:
        ArgumentError: the optimiser is not known to be elementwise; parameters lie in one memory; or existing state
            does not fit.
        DtypeError: a parameter is not in host memory.
    """
    kind = type(optimizer)
    if kind not in {getattr(torch.optim, name) for name in _ELEMENTWISE}:
        reason = _NOT.get(kind.__name__, "it is not known to treat every element by itself, whatever its neighbours")
        raise ArgumentError(
            f"shard=True cannot be used with {kind.__name__}: {reason}, and each rank holds pieces of parameters only; "
            f"expected one of torch.optim's {', '.join(_ELEMENTWISE)}"
        )
    for name, parameter in trained:
        if parameter.device.type != "cpu":
            raise DtypeError(
                f"parameter {name} is on {parameter.device}: shard=True keeps weights in memory that ranks share, "
                "which only parameters on the cpu can use"
            )
    _refuse_overlapping(trained)
    for name, parameter in trained:
        for key, value in optimizer.state.get(parameter, {}).items():
            _refuse_shape(name, parameter, key, value)


def _refuse_overlapping(trained: Named) -> None:
    extents = sorted((p.data_ptr(), p.data_ptr() + _span(p), name) for name, p in trained if p.numel())
    for (_, end, first), (start, _, second) in itertools.pairwise(extents):
        if start < end:
            raise ArgumentError(
                f"parameters {first} and {second} lie in one memory, from which shard=True would take them apart: "
                "tie them by one torch.nn.Parameter"
            )


def _span(tensor: torch.Tensor) -> int:
    reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _refuse_shape(name: str, parameter: torch.Tensor, key: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and key not in _SCALARS and value.shape != parameter.shape:
        raise ArgumentError(
            f"the optimizer's state {key!r} of parameter {name} has shape {tuple(value.shape)}; expected "
            f"{tuple(parameter.shape)} (a local state_dict() loads into the same number of ranks only)"
        )


def cut(weights: Weights, states: States) -> States:
    """Returns this rank's pieces of whole states.

    Raises:
        ArgumentError: a tensor has not its parameter's shape.
    """
    pieces: States = {}
    for index, entries in states.items():
        piece, parameter = weights.pieces[index], weights.parameters[index]
        for key, value in entries.items():
            _refuse_shape(weights.names[index], parameter, key, value)
        if not piece.owned and parameter.numel():
            continue
        pieces[index] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and key not in _SCALARS:
                value = weights.in_memory_order(index, value)[piece.start : piece.stop]  # noqa: PLW2901
            pieces[index][key] = value.clone() if isinstance(value, torch.Tensor) else value
    return pieces


def put_together(shards: Shards, weights: Weights, states: States) -> States:
    """Returns the whole states from every rank's pieces; a collective."""
    kinds = {i: {k: _kind(v) for k, v in entries.items()} for i, entries in states.items()}
    texts = shards.ranks.gather_bytes(json.dumps(kinds).encode(), "full_state_dict")
    everyone = [{int(i): entries for i, entries in json.loads(text).items()} for text in texts]
    whole: States = {}
    for index in range(len(weights.parameters)):
        owners = [rank for rank, found in enumerate(everyone) if found.get(index)]
        if owners:
            entries = everyone[owners[0]][index]
            whole[index] = {key: value for key, (dtype, value) in entries.items() if dtype is None}
            for key, (dtype, value) in entries.items():
                if dtype is not None and value is not None:
                    whole[index][key] = torch.tensor(value, dtype=getattr(torch, dtype))
    for blocks in weights.buckets:
        keys = {
            (key, dtype)
            for found in everyone
            for index in blocks.slots
            for key, (dtype, value) in found.get(index, {}).items()
            if dtype is not None and value is None
        }
        for key, dtype in sorted(keys):
            item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
            mine = np.zeros(blocks.size * item, np.uint8)
            _fill(mine, blocks, shards, weights, states, key, item)
            flat = torch.from_numpy(shards.gather_blocks(mine, "full_state_dict")).view(getattr(torch, dtype))
            for index, slot in blocks.slots.items():
                if any([dtype, None] == found.get(index, {}).get(key) for found in everyone):
                    own = flat[slot.offset : slot.offset + slot.count].clone()
                    whole[index][key] = weights.in_shape(index, own)
    return {i: {key: whole[i][key] for key in _order(i, everyone)} for i in whole}


def _fill(
    mine: np.ndarray[Any, Any], blocks: Any, shards: Shards, weights: Weights, states: States, key: str, item: int
) -> None:
    begin = shards.block * blocks.size
    for index, slot in blocks.slots.items():
        value, piece = states.get(index, {}).get(key), weights.pieces[index]
        if isinstance(value, torch.Tensor) and piece.owned:
            at = (slot.offset + piece.start - begin) * item
            raw = value.detach().contiguous().view(torch.uint8).numpy()
            mine[at : at + raw.size] = raw


def _order(index: int, everyone: list[dict[int, dict[str, Any]]]) -> Iterable[str]:
    return next(found[index] for found in everyone if found.get(index))


def _kind(value: Any) -> list[Any]:
    """Returns [dtype, None] of a tensor that is gathered, [dtype, value] of a single number, [None, value] of others.

    Raises:
        DtypeError: it can be neither.
    """
    if isinstance(value, torch.Tensor):
        return [dtype_name(value), value.item() if value.dim() == 0 else None]
    if value is None or isinstance(value, bool | int | float | str):
        return [None, value]
    raise DtypeError(f"optimizer state holds a {type(value).__name__}; expected a tensor or a number")
