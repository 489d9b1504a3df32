"""`pack` and `unpack`: many tensors of one dtype into one flat buffer and back, scaled and cast on the way.

For bulk callers in host memory `Table`: one call of the extension for a whole bucket (on a device:
`devices.Device.table`). The numpy reference stands beside, in packing_reference.py; which tensors form a bucket is
layout.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mpidl.arrays import devices, view
from mpidl.arrays.view import ArrayView
from mpidl.errors import ArgumentError, DtypeError
from mpidl.native import library


class Packed(NamedTuple):
    """What a call has written: elements, sum of squares (after scale and cast), whether all are finite."""

    count: int  # type: ignore[assignment]  # the field is wanted more than tuple's method
    sum_of_squares: float
    finite: bool


class DevicePacked:
    """What a call on a device writes, known once the device has carried it out: `Packed`, read when it is asked for.

    `count` is known at once; the first look at `sum_of_squares` or `finite` waits for the call.
    """

    def __init__(self, count: int, late: devices.Late) -> None:
        self.count = count
        self._late = late

    @property
    def sum_of_squares(self) -> float:
        return self._late.result()[1]

    @property
    def finite(self) -> bool:
        return self._late.result()[2]

    def wait(self) -> Packed:
        """Returns when the call has been carried out."""
        return Packed(*self._late.result())


@dataclass(frozen=True, slots=True)
class Table:
    """How segments lie in a flat buffer: `counts[s]` elements at offset `offsets[s]`, both in elements.

    The addresses come with each call and are trusted: each must lead to `counts[s]` elements, apart from the
    buffer, in memory that the caller keeps alive. Autograd is not told of what is written.
    """

    counts: tuple[int, ...]
    offsets: tuple[int, ...]
    segments: library.Segments = field(init=False, repr=False, compare=False)  # as the extension takes them

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.offsets):
            raise ArgumentError(f"offsets has {len(self.offsets)} entries, counts has {len(self.counts)}")
        if min((*self.counts, *self.offsets), default=0) < 0:
            raise ArgumentError("counts and offsets must not be negative")
        end = 0
        for offset, count in sorted(zip(self.offsets, self.counts, strict=True)):
            if count and offset < end:
                raise ArgumentError(f"offsets: the segment at {offset} overlaps the one that ends at {end}")
            end = max(end, offset + count)
        object.__setattr__(self, "segments", library.segments(self.counts, self.offsets))

    @property
    def extent(self) -> int:
        """Elements that the flat buffer must have at least."""
        return max(map(sum, zip(self.offsets, self.counts, strict=True)), default=0)

    def gather(
        self,
        addresses: Sequence[int],
        source_dtype: str,
        out_address: int,
        out_dtype: str,
        scale: float = 1.0,
    ) -> Packed:
        """Packs the segments at `addresses` into the buffer at `out_address`."""
        return Packed(*library.gather(self.segments, addresses, source_dtype, out_address, out_dtype, scale=scale))

    def scatter(
        self,
        addresses: Sequence[int],
        target_dtype: str,
        flat_address: int,
        flat_dtype: str,
        scale: float = 1.0,
    ) -> Packed:
        """Unpacks the buffer at `flat_address` into the segments at `addresses`."""
        return Packed(*library.scatter(self.segments, addresses, target_dtype, flat_address, flat_dtype, scale=scale))


def pack(tensors: Iterable[object], out: object, *, scale: float = 1.0) -> Packed | DevicePacked:
    """Copies tensors, each in C order, one after the other into a flat buffer: cast(element * scale).

    The product is taken in float64 for float64 and in float32 otherwise; the cast is to nearest, ties to even. With a
    scale of 1 and equal dtypes the bytes are copied unchanged. Arrays on a device are packed there, by one launch on
    the stream that is current for their kind; the call does not wait for the launch.

    Args:
        tensors: numpy arrays, torch tensors or cupy arrays of one dtype and on one device, of any shapes and strides.
        out: array of shape (n,), contiguous, n at least the number of elements of all tensors; of their dtype, or
            float32 for float16 and bfloat16, or one of these for float32. Elements beyond the tensors' stay.
        scale: finite; exactly 1 for integers and bool.

    Returns:
        The number of elements written (`count`), the sum of their squares (`sum_of_squares`) and whether all are finite
        (`finite`). For arrays on a device the first look at the last two waits for the launch.

    Raises:
        DtypeError: `tensors` are no arrays, or the dtypes cannot be packed so.
        ArgumentError: `out` is too short, read-only or strided, arrays overlap, or they lie on several devices.
        ExtensionError: arrays lie on a device, and mpidl was built without CUDA.
    """
    lot = _look(tensors)
    flat = _flat(out, "out", lot)
    if not flat.writable:
        raise ArgumentError("out is read-only")
    _check_apart(lot, flat, "out")
    lot.stand_in(view.contiguous)
    packed = _moved("gather", lot, flat, scale)
    view.mark_written(flat)
    return packed


def unpack(flat: object, tensors: Iterable[object], *, scale: float = 1.0) -> Packed | DevicePacked:
    """Copies a flat buffer back into tensors, the reverse of `pack`: cast(element * scale).

    Args:
        flat: array of shape (n,), contiguous, n at least the number of elements of all tensors; of their dtype, or
            float32 for float16 and bfloat16, or one of these for float32. It is only read.
        tensors: writable numpy arrays, torch tensors or cupy arrays of one dtype and on one device, of any shapes and
            strides, which do not overlap.
        scale: finite; exactly 1 for integers and bool.

    Returns:
        As `pack`: `count`, `sum_of_squares` and `finite` of the elements that were written.

    Raises:
        DtypeError: `tensors` are no arrays, or the dtypes cannot be unpacked so.
        ArgumentError: `flat` is too short or strided, a tensor is read-only, arrays overlap, or they lie on several
            devices.
        ExtensionError: arrays lie on a device, and mpidl was built without CUDA.
    """
    lot = _look(tensors)
    source = _flat(flat, "flat", lot)
    for i, one in enumerate(lot.views):
        if not one.writable:
            raise ArgumentError(f"tensors[{i}] is read-only or has several elements in one place")
    _check_apart(lot, source, "flat")
    _check_apart_from_each_other(lot)
    lot.stand_in(view.empty_like)
    packed = _moved("scatter", lot, source, scale)
    for one, temporary in lot.stand_ins:
        view.copy_into(one.owner, temporary.owner)
    view.mark_tensors_written(lot.in_torch)
    return packed


@dataclass(frozen=True, slots=True)
class _Lot:
    """The tensors of a call; what differs from one to the next stands in arrays, so that thousands cost little."""

    views: Sequence[ArrayView]  # of plain ones the first alone: all that is alike can be seen in it
    counts: np.ndarray[Any, Any]
    addresses: np.ndarray[Any, Any]  # of what is packed or unpacked: the tensors or their stand-ins
    starts: np.ndarray[Any, Any]  # of the bytes that each spans, gaps included,
    ends: np.ndarray[Any, Any]  # and one past the last
    in_torch: Sequence[Any]  # the tensors of torch that are written in their own place
    stand_ins: list[tuple[ArrayView, ArrayView]] = field(default_factory=list)  # after what they stand for

    def stand_in(self, make: Callable[[object], object]) -> None:
        """Gives every strided tensor a contiguous array in its place, which lives as long as the lot."""
        for i, one in enumerate(self.views):
            if not one.contiguous:
                self.stand_ins.append((one, view.view(make(one.owner))))
                self.addresses[i] = self.stand_ins[-1][1].address


def _look(tensors: Iterable[object]) -> _Lot:
    if hasattr(tensors, "dtype") or not isinstance(tensors, Iterable):
        raise DtypeError(f"tensors must be a sequence of arrays, not a single {type(tensors).__qualname__}")
    found = list(tensors)
    plain = view.plain(found)
    if plain is not None and plain.dtype in library.DTYPES:
        ends = plain.addresses + plain.counts * view.ITEMSIZES[plain.dtype]
        return _Lot([view.view(found[0])], plain.counts, plain.addresses, plain.addresses, ends, found)
    views = _views(found)
    counts = np.array([one.count for one in views], np.int64)
    addresses = np.array([one.address for one in views], np.int64)
    spans = np.array([view.extent(one) for one in views], np.int64).reshape(-1, 2)
    in_torch = [one.owner for one in views if one.kind == "torch" and one.contiguous]
    return _Lot(views, counts, addresses, spans[:, 0], spans[:, 1], in_torch)


def _views(tensors: Sequence[object]) -> list[ArrayView]:
    views = [view.view(tensor, f"tensors[{i}]") for i, tensor in enumerate(tensors)]
    for i, one in enumerate(views):
        if one.dtype != views[0].dtype:
            raise DtypeError(f"tensors[{i}] holds {one.dtype}, tensors[0] {views[0].dtype}: pack them apart")
        if one.dtype not in library.DTYPES:
            raise DtypeError(f"tensors[{i}] holds {one.dtype}, which cannot be packed")
    return views


def _moved(name: str, lot: _Lot, flat: ArrayView, scale: float) -> Packed | DevicePacked:
    """Gathers or scatters, where the flat buffer lies."""
    offsets = np.cumsum(lot.counts) - lot.counts
    dtype = lot.views[0].dtype if lot.views else flat.dtype
    if flat.device == "cpu":
        table = library.segments(lot.counts.data, offsets.data)
        move = getattr(library, name)
        return Packed(*move(table, lot.addresses.data, dtype, flat.address, flat.dtype, scale=scale))
    device = devices.of(flat)
    move = getattr(device.table(tuple(lot.counts.tolist()), tuple(offsets.tolist())), name)
    stream = device.current_stream(flat.kind)
    late = move(lot.addresses.tolist(), (dtype, flat.dtype), flat.address, scale, stream)
    return DevicePacked(int(lot.counts.sum()), late)


def _flat(x: object, name: str, lot: _Lot) -> ArrayView:
    flat = view.view(x, name)
    needed = int(lot.counts.sum())
    for i, one in enumerate(lot.views):
        if one.device != flat.device:
            raise ArgumentError(f"tensors[{i}] is on {one.device}, {name} on {flat.device}: pack on one device")
        if one.kind != flat.kind and flat.device != "cpu":
            raise ArgumentError(
                f"tensors[{i}] is {one.kind}'s, {name} {flat.kind}'s: on a device both must be of one kind, since each "
                "has a stream of its own"
            )
    if len(flat.shape) != 1 or not flat.contiguous:
        raise ArgumentError(f"{name} must be 1-D and contiguous, it has shape {flat.shape}")
    if flat.count < needed:
        raise ArgumentError(f"{name} has {flat.count} elements, the tensors have {needed}")
    return flat


def _check_apart(lot: _Lot, flat: ArrayView, name: str) -> None:
    low, high = view.extent(flat)
    overlapping = np.flatnonzero((lot.counts > 0) & (lot.starts < high) & (low < lot.ends))
    if overlapping.size:
        raise ArgumentError(f"tensors[{overlapping[0]}] overlaps {name} in memory")


def _check_apart_from_each_other(lot: _Lot) -> None:
    order = np.lexsort((lot.ends, lot.starts))
    order = order[lot.counts[order] > 0]
    overlapping = np.flatnonzero(lot.starts[order[1:]] < lot.ends[order[:-1]])
    if overlapping.size:
        i, k = sorted(order[overlapping[0] :][:2].tolist())
        raise ArgumentError(f"tensors[{i}] and tensors[{k}] overlap in memory")
