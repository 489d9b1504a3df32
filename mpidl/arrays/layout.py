"""How tensors of one dtype lie in one flat buffer: names, shapes, offsets; and how they are cut into buckets.

Pure arithmetic on frozen values. No memory is touched here and nothing is sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpidl.errors import ArgumentError

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a flat buffer; `offset` and `count` are elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    count: int


@dataclass(frozen=True)
class Layout:
    """Tensors of one dtype, one behind the other without gaps."""

    dtype: str
    slots: tuple[Slot, ...]

    @property
    def count(self) -> int:
        """Elements in all."""
        return self.slots[-1].offset + self.slots[-1].count if self.slots else 0

    def fingerprint(self) -> int:
        """Returns a 62-bit number that differs when a name, shape, dtype or the order differs; alike on all ranks."""
        text = repr((self.dtype, [(slot.name, slot.shape) for slot in self.slots]))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


@dataclass(frozen=True)
class Tensor:
    """What a layout needs to know of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together: `members` are their indices in the list that `buckets` was given."""

    layout: Layout
    members: tuple[int, ...]


def lay_out(tensors: Iterable[Tensor], dtype: str) -> Layout:
    """Returns the layout of `tensors`, in the order given, in a buffer of `dtype` (which may differ from theirs)."""
    slots, offset = [], 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        slots.append(Slot(tensor.name, tensor.shape, offset, count))
        offset += count
    return Layout(dtype, tuple(slots))


def buckets(tensors: Sequence[Tensor], cap_nbytes: int, order: Sequence[int] | None = None) -> tuple[Bucket, ...]:
    """Cuts tensors into buckets of one dtype each, in the order in which backward delivers gradients.

    Args:
        tensors: all tensors, in the model's order.
        cap_nbytes: size of a bucket, in bytes of the tensors' own dtype; only a single larger tensor exceeds it.
        order: of the gradients, an index each; None: the last tensor's first.

    Returns:
        Buckets in the order in which they fill up. Every tensor is a member of exactly one.

    Raises:
        ArgumentError: cap_nbytes is not positive.
    """
    if cap_nbytes <= 0:
        raise ArgumentError(f"a bucket's size is {cap_nbytes} bytes; expected more than 0")
    done: list[tuple[str, list[int]]] = []
    filling: dict[str, tuple[list[int], int]] = {}
    order = order if order is not None else range(len(tensors))[::-1]
    for index in order:
        tensor = tensors[index]
        members, nbytes = filling.get(tensor.dtype, ([], 0))
        if members and nbytes + tensor.nbytes > cap_nbytes:
            done.append((tensor.dtype, members))
            members, nbytes = [], 0
        filling[tensor.dtype] = ([*members, index], nbytes + tensor.nbytes)
    done += [(dtype, members) for dtype, (members, _) in filling.items()]
    place = {index: number for number, index in enumerate(order)}
    done.sort(key=lambda pair: place[pair[1][-1]])  # a bucket is full when backward reaches its last member
    return tuple(Bucket(lay_out((tensors[i] for i in m), dtype), tuple(m)) for dtype, m in done)


def fingerprint(cut: Iterable[Bucket]) -> int:
    """Returns a 62-bit number that differs when a bucket differs; alike on all ranks."""
    found = 0
    for bucket in cut:
        found = (found * 31 + bucket.layout.fingerprint()) % 2**62
    return found
