"""Values of parameter groups as JSON: numbers, tensors, dtypes and functions, to be compared or sent to other ranks.

A user's own objects have no form that other processes could compare: they are left out.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Json = Any
LEFT_OUT: Any = object()  # stands for a value that has no form as JSON
_KIND = "__kind__"  # marks an object of JSON that stands for another value


def encoded(value: Any) -> Json:
    """Returns a value as JSON from which `decoded` makes an equal one; LEFT_OUT for what cannot be sent."""
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, list | tuple | dict):
        return _of_collection(value)
    if isinstance(value, np.generic):
        return {_KIND: "numpy", "dtype": value.dtype.name, "value": encoded(value.item())}
    if isinstance(value, torch.dtype | torch.device):
        return {_KIND: type(value).__name__, "value": str(value).removeprefix("torch.")}
    return LEFT_OUT


def _of_collection(value: Any) -> Json:
    items = [encoded(item) for item in (value.values() if isinstance(value, dict) else value)]
    if any(item is LEFT_OUT for item in items):
        return LEFT_OUT
    if isinstance(value, dict):
        keys = list(value)
        whole = all(isinstance(key, str) for key in keys)
        return {_KIND: "dict", "value": [list(pair) for pair in zip(keys, items, strict=True)]} if whole else LEFT_OUT
    return items if isinstance(value, list) else {_KIND: "tuple", "value": items}


def decoded(sent: Json, here: Any) -> Any:
    """Returns the value that another rank has sent.

    Args:
        sent: from `encoded`.
        here: this rank's value. A tensor of the same shape and dtype takes the elements over and stays the same object.
    """
    if isinstance(sent, list):
        return [decoded(item, None) for item in sent]
    return _MAKERS[sent[_KIND]](sent, here) if isinstance(sent, dict) else sent


def _to_tuple(sent: Json, here: Any) -> Any:
    items = decoded(sent["value"], None)
    named = isinstance(here, tuple) and hasattr(here, "_fields") and len(here) == len(items)
    return type(here)(*items) if named else tuple(items)


def comparable(value: Any) -> str | None:
    """Returns a text that is equal for equal values; None for a value that ranks cannot compare."""
    sent = encoded(value)
    if sent is not LEFT_OUT:
        return json.dumps(_plain(sent))
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, list | tuple):
        texts = [comparable(item) for item in value]
        return None if None in texts else f"[{', '.join(map(str, texts))}]"
    return None


def described(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Returns all values of an optimiser's groups that ranks can compare, by a name with the group and the key."""
    return {
        f"{key} of parameter group {place}": text
        for place, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params" and (text := comparable(value)) is not None
    }


def sendable(group: dict[str, Any]) -> dict[str, Json]:
    """Returns the values of one group that can be sent, as JSON."""
    found = {key: encoded(value) for key, value in group.items() if key != "params"}
    return {key: value for key, value in found.items() if value is not LEFT_OUT}


def take(group: dict[str, Any], sent: dict[str, Json]) -> None:
    """Gives a group the values of another rank's `sendable`; values that were not sent stay."""
    group.update({key: decoded(value, group.get(key)) for key, value in sent.items()})


def _plain(sent: Json) -> Json:
    """Returns numbers as numbers, whether they were Python's, numpy's or tensors of one element, and no kinds."""
    if isinstance(sent, list):
        return [_plain(item) for item in sent]
    if not isinstance(sent, dict):
        return float(sent) if type(sent) is int and abs(sent) < 2**53 else sent
    value = _plain(sent["value"])
    if sent[_KIND] == "Tensor":
        return value if not sent["shape"] else [sent["shape"], value]
    return value


def _of_tensor(value: torch.Tensor) -> Json:
    if value.layout is not torch.strided or value.is_complex() or value.is_quantized or value.is_meta:
        return LEFT_OUT
    dtype = str(value.dtype).removeprefix("torch.")
    numbers = value.detach().cpu()
    if numbers.is_floating_point():
        numbers = numbers.double()
    return {_KIND: "Tensor", "dtype": dtype, "shape": list(value.shape), "value": numbers.tolist()}


def _to_tensor(sent: Json, here: Any) -> torch.Tensor:
    dtype = getattr(torch, sent["dtype"])
    numbers = torch.tensor(sent["value"], dtype=torch.float64 if dtype.is_floating_point else dtype).to(dtype)
    numbers = numbers.reshape(sent["shape"])
    if isinstance(here, torch.Tensor) and here.dtype == dtype and here.shape == numbers.shape:
        with torch.no_grad():
            return here.copy_(numbers)
    return numbers.to(here.device) if isinstance(here, torch.Tensor) else numbers


_MAKERS: dict[str, Callable[[Json, Any], Any]] = {
    "tuple": _to_tuple,
    "dict": lambda sent, _: {key: decoded(item, None) for key, item in sent["value"]},
    "numpy": lambda sent, _: np.dtype(sent["dtype"]).type(sent["value"]),
    "device": lambda sent, _: torch.device(sent["value"]),
    "dtype": lambda sent, _: getattr(torch, sent["value"]),
    "Tensor": _to_tensor,
}
