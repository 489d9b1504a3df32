"""The optimiser's state under `shard=True`: which optimisers can be sharded, how state is cut and put together.

`state_dict()` keeps torch's form, with the state of this rank's pieces, and names the pieces under "shard". A full
state is the one that the same optimiser without `shard` would have.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

from mpidl.collectives import Shards
from mpidl.errors import ArgumentError, DtypeError
from mpidl.optim.state import Named, dtype_name
from mpidl.synchronous.sharded.partition import Partition
from mpidl.synchronous.sharded.weights import Weights

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
_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})  # keys of one number for a whole parameter
_REASONS = {
    "LBFGS": "its direction comes from inner products over all parameters",
    "Muon": "it orthogonalises whole matrices",
    "Adafactor": "it keeps sums over rows and columns",
    "SparseAdam": "it takes sparse gradients",
}

States = dict[int, dict[str, Any]]  # by index of a trained parameter


def refuse(optimizer: torch.optim.Optimizer, trained: Named) -> None:
    """Refuses an optimiser or parameters that cannot be sharded.

    Raises:
        ArgumentError: the optimiser is not known to be elementwise; parameters lie in one memory; or existing state
            does not fit.
        DtypeError: a parameter is not in host memory.
    """
    kind = type(optimizer)
    if kind not in {getattr(torch.optim, name) for name in _ELEMENTWISE}:
        reason = _REASONS.get(kind.__name__, "it is not known to treat every element by itself")
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
    found: dict[int, dict[str, list[Any]]] = {
        i: next((each[i] for each in everyone if each.get(i)), {}) for i in range(len(weights.parameters))
    }
    whole: dict[tuple[int, str], torch.Tensor] = {}
    for partition in weights.partitions:
        tensors = {(key, d) for i in partition.slots for key, (d, value) in found[i].items() if d and value is None}
        for key, dtype in sorted(tensors):
            mine = {i: states[i][key] for i in partition.slots if key in states.get(i, {})}
            flat = _gathered(shards, weights, partition, mine, getattr(torch, dtype))
            for index, slot in partition.slots.items():
                if found[index].get(key) == [dtype, None]:
                    whole[index, key] = weights.in_shape(index, flat[slot.offset : slot.offset + slot.count].clone())
    return {
        index: {key: whole.get((index, key), _number(*kind)) for key, kind in entries.items()}
        for index, entries in found.items()
        if entries
    }


def _gathered(
    shards: Shards, weights: Weights, partition: Partition, mine: dict[int, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Returns one key's state of a whole bucket, in flat order; a collective."""
    block = torch.zeros(partition.size, dtype=dtype)
    for index, value in mine.items():
        at = partition.slots[index].offset + weights.pieces[index].start - shards.block * partition.size
        if value.numel():
            block[at : at + value.numel()] = value
    raw = shards.gather_blocks(block.view(torch.uint8).numpy(), "full_state_dict")
    return torch.from_numpy(raw).view(dtype)


def _number(dtype: str | None, value: Any) -> Any:
    return value if dtype is None or value is None else torch.tensor(value, dtype=getattr(torch, dtype))


def _kind(value: Any) -> list[Any]:
    """Returns [dtype, None] of a tensor that is gathered, [dtype, value] of a single number, [None, value] of others.

    Raises:
        DtypeError: the value is of none of these kinds.
    """
    if isinstance(value, torch.Tensor):
        return [dtype_name(value), value.item() if value.dim() == 0 else None]
    if value is None or isinstance(value, bool | int | float | str):
        return [None, value]
    raise DtypeError(f"optimizer state holds a {type(value).__name__}; expected a tensor or a number")
