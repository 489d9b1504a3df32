"""State that all ranks must hold alike: parameters, buffers, optimiser state; compared and broadcast.

Structures are sent as JSON and raw bytes; no rank unpickles a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.errors import ArgumentError, DtypeError, ExtensionError, MismatchError
from mpidl.mpi import topology
from mpidl.mpi.agreement import disagreement, fingerprint
from mpidl.mpi.topology import Topology
from mpidl.optim import group_values, transport

Named = list[tuple[str, torch.nn.Parameter]]
_REFUSED = "what a rank refuses"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Held:
    """A model's parameters in the model's order, sorted by whether the optimiser trains them."""

    trained: Named
    frozen: Named  # held by the optimiser, but without requires_grad
    others: Named  # not held by the optimiser


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Returns the permutation of dimensions under which a dense tensor is contiguous (channels_last, transposed)."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda d: (-strides[d], d)))


def dtype_name(tensor: torch.Tensor) -> str:
    """Returns numpy's name for a tensor's dtype, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def held_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Held:
    """Sorts the model's parameters by whether the optimiser trains them.

    Raises:
        ArgumentError: the optimiser holds a parameter that is not the model's, or none that can be trained.
        DtypeError: a held parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they
            lie on several devices.
    """
    held = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    named = list(model.named_parameters())
    strangers = [place for key, place in held.items() if key not in {id(p) for _, p in named}]
    if strangers:
        group, index = strangers[0]
        raise ArgumentError(
            f"the optimizer holds {len(strangers)} parameter(s) that are not the model's, the first at "
            f"param_groups[{group}]['params'][{index}]; build it from model.parameters()"
        )
    ours = [(name, p) for name, p in named if id(p) in held and p.requires_grad]
    if not ours:
        raise ArgumentError("the optimizer holds no parameter that requires a gradient: there is nothing to train")
    for name, parameter in ours:
        if parameter.dtype not in _DTYPES:
            raise DtypeError(f"parameter {name} is {parameter.dtype}; expected a real floating dtype")
    _check_devices(ours)
    _refuse_sparse(model, {id(p) for _, p in ours})
    frozen = [(name, p) for name, p in named if id(p) in held and not p.requires_grad]
    return Held(ours, frozen, [(name, p) for name, p in named if id(p) not in held])


def _check_devices(named: Named) -> None:
    first, there = named[0][0], arrays.view(named[0][1]).device
    for name, parameter in named:
        view = arrays.view(parameter, f"parameter {name}")
        if view.device != there:
            raise DtypeError(f"parameter {name} is on {view.device}, {first} on {there}; expected all on one device")
        if view.device != "cpu":
            try:
                devices.of(view)
            except ExtensionError as error:
                raise DtypeError(f"parameter {name} is on {view.device}: {error}") from error


def _refuse_sparse(model: torch.nn.Module, trained: set[int]) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) or not module.sparse:
            continue
        if id(module.weight) in trained:  # no gradient of others is exchanged
            raise DtypeError(
                f"module {name or 'model'} gives sparse gradients, which cannot be reduced: use sparse=False"
            )


def agree(ranks: Topology, what: str, description: dict[str, Any], error: Exception | None) -> None:
    """Raises on every rank unless all ranks give the same description and none has an error of its own.

    Args:
        ranks: the ranks that must agree; all of them call this function.
        what: name of the object for messages, such as "Synchronous".
        description: JSON-able items; the message names the first one that differs.
        error: the error that this rank found before any message was sent, or None.

    Raises:
        MismatchError: another rank's description differs, or another rank refused.
        Exception: `error`, if given.
    """
    mine = {_REFUSED: f"{type(error).__name__}: {error}"} if error is not None else description
    payload = json.dumps(mine).encode()
    if len(set(ranks.gather_bytes(str(fingerprint(payload.decode())).encode(), what))) == 1:
        if error is not None:
            raise error
        return
    everyone = [json.loads(raw) for raw in ranks.gather_bytes(payload, what)]
    if error is not None:
        raise error
    keys = dict.fromkeys(key for each in everyone for key in each)
    for key in sorted(keys, key=lambda key: key != _REFUSED):
        found = [json.dumps(each.get(key, "nothing")) for each in everyone]
        if len(set(found)) > 1:
            raise MismatchError(f"{what}: {key} differs between ranks: {disagreement(found)}")


def describe(model: torch.nn.Module, held: Held) -> dict[str, Any]:
    """Returns each tensor's shape, dtype, order in memory and role, which must be alike on all ranks."""
    roles = {"trained": held.trained, "frozen": held.frozen, "not held by the optimizer": held.others}
    role_of = {name: role for role, named in roles.items() for name, _ in named}
    description: dict[str, Any] = {}
    for name, p in model.named_parameters():
        role = role_of[name]
        transport.refuse(f"parameter {name}", p)
        order = list(memory_order(p)) if p.layout is torch.strided else []
        description[f"parameter {name}"] = [*_described(p)[:2], order, role]
    caches = caches_of(model)
    for name, b in model.named_buffers():
        transport.refuse(f"buffer {name}", b)
        if name not in caches:
            description[f"buffer {name}"] = _described(b)
    return description


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Returns each tensor's shape and dtype, which must be alike on all ranks."""
    named = {"parameter": model.named_parameters(), "buffer": model.named_buffers()}
    return {
        f"{what} {name}": [list(tensor.shape), dtype_name(tensor)]
        for what, tensors in named.items()
        for name, tensor in tensors
    }


def _described(tensor: torch.Tensor) -> list[Any]:
    layout = [] if tensor.layout is torch.strided else [str(tensor.layout).removeprefix("torch.")]
    return [list(tensor.shape), dtype_name(tensor), *layout]


def describe_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    """Returns the class, hyperparameters and grouping of an optimiser, as JSON-able items."""
    description: dict[str, Any] = {"the optimizer": type(optimizer).__name__}
    names = {id(p): name for name, p in model.named_parameters()}
    for place, group in enumerate(optimizer.param_groups):
        description[f"order of parameter group {place}"] = [names[id(p)] for p in group["params"]]
    return description | group_values.described(optimizer)


def broadcast_model(
    ranks: Topology, model: torch.nn.Module, root: int = 0, *, leaving: frozenset[str] = frozenset()
) -> None:
    """Copies root's parameters and buffers to every rank, in place; a collective.

    Args:
        ranks: who takes part.
        model: the model.
        root: whose tensors are copied.
        leaving: names of parameters that stay as they are, alike on all ranks; "parameter weight".

    Sparse buffers are compared only. A buffer that is not in the `state_dict()`, and whose shape or dtype differs
    between ranks, is each rank's own cache and stays as it is.

    Raises:
        MismatchError: a sparse buffer differs between ranks.
    """
    what = "broadcast of the model"
    everything: dict[str, torch.Tensor] = {f"parameter {name}": p for name, p in model.named_parameters()}
    everything |= {f"buffer {name}": b for name, b in model.named_buffers()}
    caches = {f"buffer {name}": b for name, b in caches_of(model).items()}
    own = set(differing(ranks, {name: _described(cache) for name, cache in caches.items()}, what))
    sparse = {name: t for name, t in everything.items() if transport.is_sparse(t) and name not in own}
    for name in differing(ranks, {name: transport.checksum(t) for name, t in sparse.items()}, what):
        raise MismatchError(
            f"{name} is sparse and differs between ranks, and only dense tensors are sent to other ranks: give every "
            "rank the same one"
        )
    left = own | sparse.keys() | leaving
    dense = [tensor for name, tensor in everything.items() if name not in left]
    transport.broadcast(ranks, dense, root, what)


def caches_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers that are not in the model's `state_dict()` (`persistent=False`), by name."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name in getattr(module, "_non_persistent_buffers_set", ()):
            buffer = module._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def differing(ranks: Topology, mine: dict[str, Any], what: str) -> dict[str, list[Any]]:
    """Returns, for each key whose value differs between ranks, the value of every rank; a collective.

    Args:
        ranks: all of them call this function.
        mine: JSON-able values of this rank; a rank without a key counts as None.
        what: the call that waits, for messages.
    """
    payload = json.dumps(mine).encode()
    if len(set(ranks.gather_bytes(str(fingerprint(payload.decode())).encode(), what))) == 1:
        return {}
    everyone = [json.loads(raw) for raw in ranks.gather_bytes(payload, what)]
    found = {key: [each.get(key) for each in everyone] for each in everyone for key in each}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def broadcast_optimizer(ranks: Topology, optimizer: torch.optim.Optimizer, root: int) -> None:
    """Copies root's optimiser state and hyperparameters to every rank; a collective.

    Raises:
        DtypeError: on root: an entry of the state is neither a tensor nor a JSON-able value.
        MismatchError: on the other ranks: root raised an error.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    payload, error = b"", None
    if ranks.rank == root:
        try:
            payload = json.dumps(_structure(optimizer, parameters)).encode()
        except (TypeError, ValueError) as found:
            error = found
    agree(ranks, "broadcast of the optimizer's state", {}, error)
    structure = json.loads(_broadcast_bytes(ranks, payload, root))
    take_hyperparameters(optimizer, structure["groups"])
    tensors: list[torch.Tensor] = []
    for position, entries in enumerate(structure["state"]):
        state = optimizer.state[parameters[position]] if entries else {}
        if not entries:
            optimizer.state.pop(parameters[position], None)
        for key, entry in entries.items():
            state[key] = _made(entry, state.get(key), parameters[position], tensors)
    transport.broadcast(ranks, tensors, root, "broadcast of the optimizer's state")


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns the hyperparameters of each group as JSON; see `group_values` for those that are left out."""
    return [group_values.sendable(group) for group in optimizer.param_groups]


def take_hyperparameters(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Takes over another rank's `hyperparameters`."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group_values.take(group, values)


def _broadcast_bytes(ranks: Topology, payload: bytes, root: int) -> bytes:
    length = ranks.gather_words(np.array([len(payload)], np.int64), "broadcast of a structure")[root, 0]
    buffer = np.zeros(max(1, int(length)), np.uint8)
    if ranks.rank == root:
        buffer[: len(payload)] = np.frombuffer(payload, np.uint8)
    sequence = ranks.begin()
    requests = ranks.start_broadcast(arrays.view(buffer), root)
    topology.wait_all(ranks, requests, "broadcast of a structure", sequence, buffer)
    return buffer[: int(length)].tobytes()


def _structure(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> dict[str, Any]:
    """Returns {"groups": [hyperparameters], "state": [{key: entry}]}, the state in the order of the parameters."""
    state = [
        {key: _entry(key, value, parameter) for key, value in optimizer.state.get(parameter, {}).items()}
        for parameter in parameters
    ]
    return {"groups": hyperparameters(optimizer), "state": state}


def _entry(key: str, value: Any, parameter: torch.Tensor) -> list[Any]:
    """Returns [dtype, shape, value, whether it lies on the parameter's device]; of a list (LBFGS) [None, entries]."""
    if isinstance(value, torch.Tensor):
        on_device = value.device == parameter.device  # a count of steps mostly lies on the cpu
        return [dtype_name(value), list(value.shape), None, on_device]
    if value is None or isinstance(value, bool | int | float | str):
        return [None, None, value, False]
    if isinstance(value, list):
        return [None, [_entry(key, item, parameter) for item in value]]
    raise DtypeError(f"optimizer state {key!r} is a {type(value).__name__}; expected a tensor or a number")


def _made(entry: list[Any], old: Any, parameter: torch.Tensor, tensors: list[torch.Tensor]) -> Any:
    """Returns the value of an entry; a tensor is added to those whose elements root sends."""
    if len(entry) == 2:
        before = old if isinstance(old, list) and len(old) == len(entry[1]) else [None] * len(entry[1])
        return [_made(item, one, parameter, tensors) for item, one in zip(entry[1], before, strict=True)]
    dtype, shape, value, on_device = entry
    if dtype is None:
        return value
    if not (isinstance(old, torch.Tensor) and dtype_name(old) == dtype and list(old.shape) == shape):
        old = torch.zeros(shape, dtype=getattr(torch, dtype), device=parameter.device if on_device else "cpu")
    tensors.append(old)
    return old
