"""The flat parameter: a model's parameters as one flat array in host memory, on which algorithms compute.

On a device one launch packs all parameters of a dtype straight into pinned memory, and one launch unpacks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from mpidl.arrays import devices, packing
from mpidl.arrays import view as arrays
from mpidl.arrays.layout import Layout, Slot, Tensor, lay_out
from mpidl.optim import state

Flat = np.ndarray[Any, Any]  # one-dimensional: all parameters in a layout's order, or values in the same layout

_PIECE = 1 << 15  # elements that stay in a core's cache while several operations work on them


class Few(NamedTuple):
    """A flat array whose elements are zeros, but for those at some ascending indices."""

    values: Flat
    at: np.ndarray[Any, Any]


def orders_of(named: state.Named) -> list[tuple[int, ...]]:
    """Returns each parameter's permutation of dimensions under which it is contiguous."""
    return [state.memory_order(p) for _, p in named]


def views(named: state.Named, orders: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Returns contiguous views of the parameters where they lie now: `model.to()` and the like move them."""
    return [p.detach().permute(order) for (_, p), order in zip(named, orders, strict=True)]


def layout_of(named: state.Named, orders: list[tuple[int, ...]]) -> Layout:
    """Returns the layout of parameters in a flat array: float64 if some parameter is float64, else float32."""
    wide = any(p.dtype == torch.float64 for _, p in named)
    tensors = [
        Tensor(name, tuple(view.shape), state.dtype_name(view))
        for (name, _), view in zip(named, views(named, orders), strict=True)
    ]
    return lay_out(tensors, "float64" if wide else "float32")


def new(layout: Layout, like: torch.Tensor) -> Flat:
    """Returns memory for a flat array of this layout, for packing from and unpacking to the device of `like`."""
    view = arrays.view(like)
    if view.device == "cpu":
        return np.empty(layout.count, layout.dtype)
    dtype = np.dtype(layout.dtype)
    return devices.of(view).pinned(layout.count * dtype.itemsize).view(dtype)


class Memory:
    """Recycled memory for flat arrays: in a new array each page costs a fault, which takes longer than a copy.

    Args:
        layout: of all the flat arrays.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._spare: list[Flat] = []

    def take(self, like: torch.Tensor) -> Flat:
        """Returns memory with arbitrary content, as `new` does; `like` is a parameter where it lies now."""
        self._keep_for(like)
        return self._spare.pop() if self._spare else new(self._layout, like)

    def give_back(self, like: torch.Tensor, *unused: Flat) -> None:
        """Takes unused memory back; not for parameters on a device, since copies to it may still be under way."""
        self._spare.extend(unused)
        self._keep_for(like)

    def _keep_for(self, like: torch.Tensor) -> None:
        if arrays.view(like).device != "cpu":
            self._spare.clear()


def pack(layout: Layout, tensors: list[torch.Tensor], flat: Flat | None = None) -> Flat:
    """Returns the tensors' elements, in C order, in a flat array; on a device, waits for the current stream.

    Args:
        layout: as `layout_of` returned it.
        tensors: in the layout's order.
        flat: memory from `new` to pack into; None: new memory.
    """
    flat = new(layout, tensors[0]) if flat is None else flat
    if arrays.view(tensors[0]).device == "cpu":
        for tensor, slot in zip(tensors, layout.slots, strict=True):
            packing.pack([_packable(tensor, flat)], flat[slot.offset : slot.offset + slot.count])
        return flat
    dense = [_packable(tensor, flat).contiguous() for tensor in tensors]
    _on_device("gather", flat, dense, layout).wait()
    return flat


def unpack(layout: Layout, flat: Flat, tensors: list[torch.Tensor]) -> None:
    """Copies a flat array from `new` or `pack` into tensors, in the order of their device's stream."""
    names = [_packable(tensor, flat) for tensor in tensors]
    dense = [
        one
        if one is tensor and tensor.is_contiguous()
        else torch.empty_like(one, memory_format=torch.contiguous_format)
        for one, tensor in zip(names, tensors, strict=True)
    ]
    if arrays.view(tensors[0]).device == "cpu":
        for one, slot in zip(dense, layout.slots, strict=True):
            packing.unpack(flat[slot.offset : slot.offset + slot.count], [one])
    else:
        _on_device("scatter", flat, dense, layout)
    for one, tensor in zip(dense, tensors, strict=True):
        if one is tensor:
            arrays.mark_written(arrays.view(tensor))
        else:
            tensor.copy_(one)


def parts(layout: Layout, flat: Flat) -> list[torch.Tensor]:
    """Returns flat views of a flat array, one for each tensor of the layout."""
    return [torch.from_numpy(flat[slot.offset : slot.offset + slot.count]) for slot in layout.slots]


def shift(layout: Layout, tensors: list[torch.Tensor], before: Flat, after: Flat) -> None:
    """Adds `after - before` to tensors; where both are equal, no bit of a tensor changes.

    Args:
        layout, tensors: as `pack`.
        before, after: flat; `before` is overwritten.
    """
    on_cpu = arrays.view(tensors[0]).device == "cpu"
    in_place = on_cpu and is_whole(layout, tensors) and all(tensor.is_contiguous() for tensor in tensors)
    moved = pack(layout, tensors) if not in_place else before
    for place, now in _pieces(layout, parts(layout, moved) if not in_place else tensors, before):
        by = np.subtract(after[place], before[place], out=before[place])
        if by.any():
            np.add(now, by, out=now)
    if in_place:
        for tensor in tensors:
            arrays.mark_written(arrays.view(tensor))
    else:
        unpack(layout, moved, tensors)


def round_like(layout: Layout, tensors: list[torch.Tensor], flat: Flat) -> None:
    """Rounds a flat array from `new` to the dtypes of tensors."""
    dense = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    unpack(layout, flat, dense)
    pack(layout, dense, flat)


def is_whole(layout: Layout, tensors: list[torch.Tensor]) -> bool:
    """Returns whether all tensors have the flat array's dtype, so that unpacking into them rounds nothing."""
    return all(state.dtype_name(tensor) == layout.dtype for tensor in tensors)


def moves(layout: Layout, tensors: list[torch.Tensor], start: Flat, out: Flat, divisor: int = 1) -> bool:
    """Writes (tensors - start) / divisor into `out`; returns whether it holds neither an infinity nor a NaN.

    Args:
        layout, tensors: as `pack`.
        start: flat.
        out: flat, from `new`.
        divisor: 1 leaves the differences as they are.
    """
    finite = True
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
        for place, now in _pieces(layout, tensors, out):
            moved = np.subtract(now, start[place], out=out[place])
            if divisor != 1:
                np.divide(moved, divisor, out=moved)
            # A finite sum has finite terms; otherwise it may only be too large.
            finite = finite and bool(np.isfinite(moved.sum()) or np.isfinite(moved).all())
    return finite


def rounding(layout: Layout, tensors: list[torch.Tensor], start: Flat, moved: Flat, out: Flat) -> Few:
    """Writes tensors - (start + moved), mostly zeros, into `out`; args as `moves`."""
    found = [np.empty(0, np.intp)]
    for place, now in _pieces(layout, tensors, out):
        short = np.subtract(now, start[place] + moved[place], out=out[place])
        found.append(np.flatnonzero(short != 0) + place.start)  # on booleans flatnonzero is many times as fast
    return Few(out, np.concatenate(found))


def _pieces(layout: Layout, tensors: list[torch.Tensor], spare: Flat) -> Iterator[tuple[slice, Flat]]:
    """Yields the tensors' elements in pieces that fit in a cache, each with its slice of the flat array.

    Args:
        layout, tensors: as `pack`.
        spare: receives the elements if they cannot be read in place: on a device, or in another dtype.
    """
    if arrays.view(tensors[0]).device == "cpu" and is_whole(layout, tensors):
        found = [(slot.offset, one.numpy().reshape(-1)) for one, slot in zip(tensors, layout.slots, strict=True)]
    else:
        found = [(0, pack(layout, tensors, spare))]
    for offset, values in found:
        for at in range(0, values.size, _PIECE):
            piece = values[at : at + _PIECE]
            yield slice(offset + at, offset + at + piece.size), piece


def _packable(tensor: torch.Tensor, flat: Flat) -> torch.Tensor:
    """Returns `tensor`, or a copy in the dtype of `flat` where packing cannot convert between the two dtypes."""
    names = {state.dtype_name(tensor), flat.dtype.name}
    return tensor.to(getattr(torch, flat.dtype.name)) if "float64" in names and len(names) > 1 else tensor


def _on_device(name: str, flat: Flat, dense: list[torch.Tensor], layout: Layout) -> devices.Event:
    """Packs or unpacks with one launch for each dtype; returns an event behind them in the stream."""
    device = devices.of(arrays.view(dense[0]))
    stream = device.current_stream("torch")
    by_dtype: dict[str, list[tuple[torch.Tensor, Slot]]] = {}
    for tensor, slot in zip(dense, layout.slots, strict=True):
        by_dtype.setdefault(state.dtype_name(tensor), []).append((tensor, slot))
    for dtype, rows in by_dtype.items():
        table = device.table(tuple(slot.count for _, slot in rows), tuple(slot.offset for _, slot in rows))
        addresses = [arrays.view(tensor).address for tensor, _ in rows]
        getattr(table, name)(addresses, (dtype, flat.dtype.name), flat.ctypes.data, 1.0, stream)
    done = device.record(stream)
    device.keep(done, (flat, dense))
    return done
