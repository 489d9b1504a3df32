"""Notices parameters that something else than their distributed optimiser has written or changed since its last step.

A write is known by the version counter that torch keeps for each tensor. A write through `p.data` does not count there;
some sampled elements then tell, or a new address.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from mpidl.arrays import packing
from mpidl.arrays import view as arrays
from mpidl.arrays.layout import ITEMSIZE
from mpidl.errors import ArgumentError
from mpidl.optim.signature import registered_in
from mpidl.optim.state import Named, dtype_name

_SAMPLES = 128  # elements of a model: half of them are spread over parameters, the others over elements
_WRITTEN, _RESHAPED, _REPLACED, _GROUPS = range(4)
_KINDS = 4
_LATER = "make such a change before mpidl.{kind} or after its finish()"
_ERRORS = {
    _WRITTEN: (
        "parameter {name} was written outside a step, and mpidl.{kind} would take the write for training: call "
        "broadcast_parameters() on all ranks after the write to start anew from rank 0's weights, or, if it belongs to "
        "each local step as a projection does, write in a hook of register_step_post_hook()"
    ),
    _RESHAPED: (
        "parameter {name} has changed; expected {dtype} of shape {shape} as when mpidl.{kind} was made "
        f"(model.double(), pruning and `p.data = ...` do that): {_LATER}"
    ),
    _REPLACED: (
        "parameter {name} was replaced in the model by another tensor, which no optimizer trains "
        f"(load_state_dict(assign=True) and `module.weight = Parameter(...)` do that): {_LATER}"
    ),
    _GROUPS: f"the parameters in param_groups are no longer those that mpidl.{{kind}} was given: {_LATER}",
}


class WriteCheck:
    """Compares a model's trained parameters with what they were at the last `note`.

    What was put back is no write: an average that is copied in for an evaluation and out again. The elements that are
    sampled tell. A parameter that has moved to other memory, by `model.to()`, is not written either.

    Args:
        kind: name of the optimiser's class, for messages.
        optimizer: the user's.
        model: holds the parameters.
        named: the trained parameters with their names, in an order equal on all ranks.

    Attributes:
        put_back: whether a check has found writes that have put back what was there, or moves in memory.
    """

    def __init__(self, kind: str, optimizer: torch.optim.Optimizer, model: torch.nn.Module, named: Named) -> None:
        self._kind, self._optimizer, self._model = kind, optimizer, model
        self._names, self._parameters = [name for name, _ in named], [p for _, p in named]
        self._forms = [(p.shape, p.dtype) for p in self._parameters]
        self._shapes, self._dtypes = [p.shape for p in self._parameters], [p.dtype for p in self._parameters]
        self._in_groups = self._groups()
        self._registered, self._renamed = self._places(), set[int]()
        self._sample = _Sample(self._parameters)
        self._addresses: list[int] = []
        self.put_back = False
        self.note()

    def note(self) -> None:
        """Takes the parameters' present values for those that the optimiser has given them."""
        addresses = [p.data_ptr() for p in self._parameters]
        if addresses != self._addresses:
            self._addresses = addresses
            self._sample.lies_at(self._parameters, self._forms)
        self._versions, self._renamed = self._versions_now(), set()
        self._values = self._sample.read()

    def check(self) -> int:
        """Returns 0, or the number of the error that `describe_error` words, on every rank.

        Cheap where nothing has changed: it is called in every step.
        """
        parameters = self._parameters
        if (
            [p.data_ptr() for p in parameters] == self._addresses
            and [p.shape for p in parameters] == self._shapes
            and [p.dtype for p in parameters] == self._dtypes
            and self._versions_now() == self._versions
            and self._sample.read() == self._values  # last: only memory at known addresses may be read
            and _same(self._groups(), self._in_groups)
            and not [name for held, name, p in self._registered if held.get(name) is not p]
        ):
            return 0
        number = self.changed()
        if number:
            return number
        written = self.written()
        if written:
            return self._number(self._names.index(written[0]), _WRITTEN)
        self.put_back = True
        self.note()
        return 0

    def changed(self) -> int:
        """Returns as `check`, but lets parameters be written: 0 if they are those that the optimiser was made for."""
        for index, p in enumerate(self._parameters):
            if (p.shape, p.dtype) != self._forms[index]:
                return self._number(index, _RESHAPED)
        found = {id(p) for p in self._model.parameters()}
        for index, p in enumerate(self._parameters):
            if id(p) not in found:
                return self._number(index, _REPLACED)
        before, self._registered = self._registered, self._places()
        # A parametrization holds the same parameter by another name, and writes it once, mostly with what it was.
        self._renamed = {id(p) for held, name, p in self._registered if not _is_among(before, held, name)}
        return 0 if _same(self._groups(), self._in_groups) else self._number(0, _GROUPS)

    def written(self) -> list[str]:
        """Returns the names of the parameters that were written, if `changed` finds nothing.

        An element that differs was written, and so was a parameter with one write to it: two may have put back what was
        there. If one parameter was written, all are that had writes.
        """
        found = self._sample.differing(self._values, self.values())
        writes = [now - then for now, then in zip(self._versions_now(), self._versions, strict=True)]
        if not found and 1 not in [
            n for n, p in zip(writes, self._parameters, strict=True) if id(p) not in self._renamed
        ]:
            return []
        return [name for index, name in enumerate(self._names) if index in found or writes[index]]

    def describe_error(self, number: int) -> ArgumentError:
        """Returns the error of a number from `check`."""
        index, kind = divmod(number - 1, _KINDS)
        name, (shape, dtype) = self._names[index], self._forms[index]
        return ArgumentError(_ERRORS[kind].format(name=name, kind=self._kind, shape=tuple(shape), dtype=dtype))

    def values(self) -> bytes:
        """Returns the sampled elements as they are now."""
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            self._addresses = []
            self._sample.lies_at(self._parameters, self._forms)
        return self._sample.read()

    @staticmethod
    def _number(index: int, kind: int) -> int:
        return 1 + _KINDS * index + kind

    def _versions_now(self) -> list[int]:
        try:
            return [p._version for p in self._parameters]
        except RuntimeError:  # tensors of inference mode have no versions
            return [0 if p.is_inference() else p._version for p in self._parameters]

    def _groups(self) -> list[Any]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _places(self) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
        trained = {id(p) for p in self._parameters}
        return [
            (held, name, p)
            for held in map(registered_in, self._model.modules())
            for name, p in held.items()
            if p is not None and id(p) in trained
        ]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _is_among(places: list[tuple[dict[str, Any], str, torch.Tensor]], held: dict[str, Any], name: str) -> bool:
    return any(each is held and its_name == name for each, its_name, _ in places)


class _Sample:
    """Some elements of a model's parameters, read in place by one call for each dtype; none on a device.

    Args:
        parameters: of which elements are chosen, once.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        counts = np.array([p.numel() for p in parameters])
        ends = counts.cumsum()
        total = int(ends[-1])
        spread = np.linspace(0, total - 1, min(total, _SAMPLES // 2 if total > _SAMPLES else total)).astype(np.int64)
        some = np.unique(np.linspace(0, len(parameters) - 1, min(len(parameters), _SAMPLES // 2)).astype(np.int64))
        middles = np.array([ends[i] - counts[i] + counts[i] // 2 for i in some if counts[i]], np.int64)
        chosen = np.unique(np.concatenate([spread, middles]))
        owners = np.searchsorted(ends, chosen, side="right")
        self._of: list[tuple[int, int]] = [  # parameter, element in C order
            (int(i), int(at - (ends[i] - counts[i]))) for i, at in zip(owners, chosen, strict=True)
        ]
        self._dtypes = sorted({dtype_name(p) for p in parameters})
        self._of.sort(key=lambda place: self._dtypes.index(dtype_name(parameters[place[0]])))
        self._sizes = [ITEMSIZE[dtype_name(parameters[i])] for i, _ in self._of]
        self._reads: list[tuple[packing.Table, Any, str, int]] = []
        self._out = np.zeros(sum(self._sizes) + 8 * len(self._dtypes), np.uint8)

    def lies_at(self, parameters: list[torch.nn.Parameter], forms: list[Any]) -> None:
        """Finds the elements where the parameters lie now."""
        self._reads = []
        usable = all((p.shape, p.dtype) == form for p, form in zip(parameters, forms, strict=True))
        usable = usable and all(arrays.view(p).device == "cpu" for p in parameters)
        at = 0
        for dtype in self._dtypes if usable else ():
            places = [(i, k) for i, k in self._of if dtype_name(parameters[i]) == dtype]
            addresses = [_address(parameters[i], k) for i, k in places]
            table = packing.Table((1,) * len(places), tuple(range(len(places))))
            self._reads.append((table, np.array(addresses, np.int64).data, dtype, self._out.ctypes.data + at))
            at += ITEMSIZE[dtype] * len(places)

    def read(self) -> bytes:
        """Returns the elements' bytes; none on a device."""
        for table, addresses, dtype, out in self._reads:
            table.gather(addresses, dtype, out, dtype)
        return self._out.tobytes() if self._reads else b""

    def differing(self, before: bytes, now: bytes) -> set[int]:
        """Returns the parameters of which sampled elements differ; none if one of both was not read."""
        if not before or not now:
            return set()
        found, at = set(), 0
        for (index, _), size in zip(self._of, self._sizes, strict=True):
            if before[at : at + size] != now[at : at + size]:
                found.add(index)
            at += size
        return found


def _address(tensor: torch.Tensor, element: int) -> int:
    place = np.unravel_index(element, tuple(tensor.shape)) if tensor.dim() else ()
    offset = sum(int(i) * stride for i, stride in zip(place, tensor.stride(), strict=True))
    return tensor.data_ptr() + offset * tensor.element_size()
