"""`pack` and `unpack`: many tensors of one dtype into one flat buffer and back, scaled and cast on the way.

For bulk callers in host memory `Table`: one call of the extension for a whole bucket (on a device:
`devices.Device.table`). The numpy reference stands beside, in
packing_reference.py; which tensors form a bucket is layout.py's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from mpidl import _native, arrays, devices
from mpidl.arrays import ArrayView
from mpidl.errors import ArgumentError, DtypeError


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
    segments: _native.Segments = field(init=False, repr=False, compare=False)  # as the extension takes them

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
        object.__setattr__(self, "segments", _native.segments(self.counts, self.offsets))

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
        """Pack the segments at `addresses` into the buffer at `out_address`."""
        return Packed(*_native.gather(self.segments, addresses, source_dtype, out_address, out_dtype, scale=scale))

    def scatter(
        self,
        addresses: Sequence[int],
        target_dtype: str,
        flat_address: int,
        flat_dtype: str,
        scale: float = 1.0,
    ) -> Packed:
        """Unpack the buffer at `flat_address` into the segments at `addresses`."""
        return Packed(*_native.scatter(self.segments, addresses, target_dtype, flat_address, flat_dtype, scale=scale))


def pack(tensors: Iterable[object], out: object, *, scale: float = 1.0) -> Packed | DevicePacked:
    """Copy tensors, each in C order, one after the other into a flat buffer: cast(element * scale).

    The product is in float64 for float64 and in float32 otherwise; the cast is to nearest, ties to even. At
    scale 1 and equal dtypes the bytes are copied unchanged. Arrays on a device are packed there, by one launch on the
    stream that is current for their kind; the call does not wait for it.

    Args:
        tensors: arrays of one dtype, of any shapes and strides.
        out: 1-D, contiguous, at least as many elements as all tensors; of their dtype, or float32 for float16
            and bfloat16, or one of these for float32. What lies beyond is not touched.
        scale: finite; exactly 1 for integers and bool.

    Raises:
        DtypeError: not arrays, or dtypes that cannot be packed so.
        ArgumentError: an argument that cannot work: too short, read-only, strided, overlapping, on several devices.
        ExtensionError: arrays on a device, and mpidl was built without CUDA.
    """
    views = _views(tensors)
    flat = _flat(out, "out", views)
    if not flat.writable:
        raise ArgumentError("out is read-only")
    _check_apart(views, flat, "out")
    dense = [one if one.contiguous else arrays.view(arrays.contiguous(one.owner)) for one in views]
    packed = _moved("gather", dense, flat, scale)
    arrays.mark_written(flat)
    return packed


def unpack(flat: object, tensors: Iterable[object], *, scale: float = 1.0) -> Packed | DevicePacked:
    """Copy a flat buffer back into tensors, the reverse of `pack`.

    Args:
        flat: as `out` of `pack`, but only read.
        tensors: writable arrays that do not overlap; otherwise as in `pack`.
        scale: as in `pack`.

    Raises:
        DtypeError, ArgumentError: as `pack`.
    """
    views = _views(tensors)
    source = _flat(flat, "flat", views)
    for i, one in enumerate(views):
        if not one.writable:
            raise ArgumentError(f"tensors[{i}] is read-only or has several elements in one place")
    _check_apart(views, source, "flat")
    _check_apart_from_each_other(views)
    dense = [one if one.contiguous else arrays.view(arrays.empty_like(one.owner)) for one in views]
    packed = _moved("scatter", dense, source, scale)
    for one, temporary in zip(views, dense, strict=True):
        if one is temporary:
            arrays.mark_written(one)
        else:
            arrays.copy_into(one.owner, temporary.owner)
    return packed


def _moved(name: str, dense: Sequence[ArrayView], flat: ArrayView, scale: float) -> Packed | DevicePacked:
    """Gathers or scatters, where the flat buffer lies."""
    counts = tuple(one.count for one in dense)
    offsets = tuple(accumulate(counts, initial=0))[:-1]
    addresses = [one.address for one in dense]
    dtypes = (dense[0].dtype if dense else flat.dtype, flat.dtype)
    if flat.device == "cpu":
        move = getattr(Table(counts, offsets), name)
        packed: Packed = move(addresses, dtypes[0], flat.address, flat.dtype, scale)
        return packed
    device = devices.of(flat)
    move = getattr(device.table(counts, offsets), name)
    late = move(addresses, dtypes, flat.address, scale, device.current_stream(flat.kind))
    return DevicePacked(sum(counts), late)


def _views(tensors: Iterable[object]) -> list[ArrayView]:
    if hasattr(tensors, "dtype") or not isinstance(tensors, Iterable):
        raise DtypeError(f"tensors must be a sequence of arrays, not a single {type(tensors).__qualname__}")
    views = [arrays.view(tensor, f"tensors[{i}]") for i, tensor in enumerate(tensors)]
    for i, one in enumerate(views):
        if one.dtype != views[0].dtype:
            raise DtypeError(f"tensors[{i}] holds {one.dtype}, tensors[0] {views[0].dtype}: pack them apart")
        if one.dtype not in _native.DTYPES:
            raise DtypeError(f"tensors[{i}] holds {one.dtype}, which cannot be packed")
    return views


def _flat(x: object, name: str, views: Sequence[ArrayView]) -> ArrayView:
    flat = arrays.view(x, name)
    needed = sum(one.count for one in views)
    for i, one in enumerate(views):
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


def _check_apart(views: Sequence[ArrayView], flat: ArrayView, name: str) -> None:
    low, high = arrays.extent(flat)
    for i, one in enumerate(views):
        first, last = arrays.extent(one)
        if one.count and first < high and low < last:
            raise ArgumentError(f"tensors[{i}] overlaps {name} in memory")


def _check_apart_from_each_other(views: Sequence[ArrayView]) -> None:
    spans = sorted((*arrays.extent(one), i) for i, one in enumerate(views) if one.count)
    for (_, end, i), (start, _, k) in pairwise(spans):
        if start < end:
            raise ArgumentError(f"tensors[{min(i, k)}] and tensors[{max(i, k)}] overlap in memory")
