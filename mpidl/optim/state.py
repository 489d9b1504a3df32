"""State that all ranks must hold alike: parameters, buffers, optimiser state; compared, broadcast, averaged.

Structures are sent as JSON and raw bytes; no rank unpickles a message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.arrays.view import ArrayView
from mpidl.errors import ArgumentError, DtypeError, ExtensionError, MismatchError
from mpidl.mpi import topology
from mpidl.mpi.agreement import disagreement, fingerprint
from mpidl.mpi.topology import Topology

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
    _refuse_sparse(model)
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


def _refuse_sparse(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
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
        description[f"parameter {name}"] = [list(p.shape), dtype_name(p), list(memory_order(p)), role]
    for name, b in model.named_buffers():
        description[f"buffer {name}"] = [list(b.shape), dtype_name(b)]
    return description


def describe_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    """Returns the class, hyperparameters and grouping of an optimiser, as JSON-able items."""
    description: dict[str, Any] = {"the optimizer": type(optimizer).__name__}
    names = {id(p): name for name, p in model.named_parameters()}
    for place, group in enumerate(optimizer.param_groups):
        description[f"order of parameter group {place}"] = [names[id(p)] for p in group["params"]]
        for key, value in group.items():
            if key != "params":
                description[f"{key} of parameter group {place}"] = repr(value)
    return description


def broadcast_model(ranks: Topology, model: torch.nn.Module, root: int = 0) -> None:
    """Copies root's parameters and buffers to every rank, in place; a collective."""
    _broadcast(ranks, [*model.parameters(), *model.buffers()], root, "broadcast of the model")


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
    tensors = []
    for position, entries in enumerate(structure["state"]):
        state = optimizer.state[parameters[position]] if entries else {}
        if not entries:
            optimizer.state.pop(parameters[position], None)
        for key, (dtype, shape, value, on_device) in entries.items():
            if dtype is None:
                state[key] = value
                continue
            old = state.get(key)
            if not (isinstance(old, torch.Tensor) and dtype_name(old) == dtype and list(old.shape) == shape):
                place = parameters[position].device if on_device else "cpu"
                state[key] = torch.zeros(shape, dtype=getattr(torch, dtype), device=place)
            tensors.append(state[key])
    _broadcast(ranks, tensors, root, "broadcast of the optimizer's state")


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns the hyperparameters of each group that are not tensors."""
    return [
        {k: v for k, v in group.items() if k != "params" and not isinstance(v, torch.Tensor)}
        for group in optimizer.param_groups
    ]


def take_hyperparameters(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Takes over another rank's `hyperparameters`, sent as JSON, in which tuples have become lists."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items()})


def average_buffers(ranks: Topology, model: torch.nn.Module) -> None:
    """Makes buffers alike: floating ones become the mean over ranks, others are taken from rank 0; a collective."""
    floating = [b for b in model.buffers() if b.dtype in _DTYPES]
    others = [b for b in model.buffers() if b.dtype not in _DTYPES]
    for buffer in floating:
        wide = buffer.detach().to(torch.float64 if buffer.dtype == torch.float64 else torch.float32).contiguous()
        total = torch.empty_like(wide)
        if wide.numel():
            sequence = ranks.begin()
            send, receive = _on_host(wide), _host_for(total)
            requests = ranks.start_allreduce(send, receive, "sum")
            topology.wait_all(ranks, requests, "mean of the buffers", sequence, (send, receive, wide, total))
            _back(receive, total)
        with torch.no_grad():
            buffer.copy_(total / ranks.size)
    _broadcast(ranks, others, 0, "broadcast of the buffers")


def _broadcast(ranks: Topology, tensors: Iterable[torch.Tensor], root: int, what: str) -> None:
    with torch.no_grad():
        for tensor in tensors:
            # In logical order: strides of buffers and of optimiser state may differ between ranks.
            dense = tensor.detach()
            flat = dense.contiguous()
            if flat.numel():
                sequence = ranks.begin()
                host = _on_host(flat) if ranks.rank == root else _host_for(flat)
                topology.wait_all(ranks, ranks.start_broadcast(host, root), what, sequence, (host, flat))
                if ranks.rank != root:
                    _back(host, flat)
            if flat is not dense:
                dense.copy_(flat)


def _on_host(tensor: torch.Tensor) -> ArrayView:
    """Returns a dense tensor's memory if the tensor lies in host memory, or else a copy in host memory."""
    view = arrays.view(tensor)
    if view.device == "cpu":
        return view
    host, copied = devices.of(view).fetch(view)
    copied.wait()
    return host


def _host_for(tensor: torch.Tensor) -> ArrayView:
    """Returns host memory to receive a dense tensor's elements: the tensor's own memory, if that is host memory."""
    view = arrays.view(tensor)
    return view if view.device == "cpu" else devices.of(view).like(view, view.shape)


def _back(host: ArrayView, tensor: torch.Tensor) -> None:
    """Copies elements received in `_host_for(tensor)` into the tensor, in the order of its device's stream."""
    view = arrays.view(tensor)
    if view.device != "cpu":
        devices.of(view).deliver(host, view)


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
    """Returns {"groups": [hyperparameters], "state": [{key: [dtype, shape, value, whether it lies on the
    parameter's device]}]}, state in parameter order."""
    state = []
    for parameter in parameters:
        entries: dict[str, Any] = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                on_device = value.device == parameter.device  # a count of steps mostly lies on the cpu
                entries[key] = [dtype_name(value), list(value.shape), None, on_device]
            elif value is None or isinstance(value, bool | int | float | str):
                entries[key] = [None, None, value, False]
            else:
                raise DtypeError(f"optimizer state {key!r} is a {type(value).__name__}; expected a tensor or a number")
        state.append(entries)
    return {"groups": hyperparameters(optimizer), "state": state}
