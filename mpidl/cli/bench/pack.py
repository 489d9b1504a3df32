"""Many tensors into one buffer and back: mpidl.pack and packing.Table against memcpy and torch.

One process. The buffers stay where they are, as a bucket's do, but for torch's flatten, which makes a new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from mpidl.arrays import packing
from mpidl.cli.bench import models, targets
from mpidl.cli.bench.harness import Case, Contender, Field
from mpidl.cli.bench.ranks import Ranks

REFERENCE, RATE = targets.MEMCPY, "M elements/s"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fields(ranks: Ranks, quick: bool) -> Iterator[tuple[Case, AbstractContextManager[Field]]]:
    for case in cases(ranks.size, quick):
        yield case, nullcontext(Field(ranks, _Memory(case).contenders()))


def cases(ranks: int, quick: bool) -> list[Case]:
    return [
        Case(
            f"{direction} {len(shapes):,} tensors, {dtype}",
            {"direction": direction, "tensors": len(shapes), "dtype": dtype, "shapes": name},
            sum(math.prod(shape) for shape in shapes) / 1e6,
        )
        for name, shapes in _shapes(quick).items()
        for direction in ("pack", "unpack")
        for dtype in _DTYPES
    ]


def _shapes(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    if quick:
        return {"a few": [(64, 64)] * 20, "small": models.many_small_shapes(200)}
    return {"ResNet-50": models.resnet50_shapes(), "small": models.many_small_shapes(10_000)}


class _Memory:
    """The tensors and buffers of one case."""

    def __init__(self, case: Case) -> None:
        shapes = {len(found): found for quick in (True, False) for found in _shapes(quick).values()}
        generator = torch.Generator().manual_seed(0)
        self._packs = case.parameters["direction"] == "pack"
        self._tensors = [torch.randn(shape, generator=generator) for shape in shapes[case.parameters["tensors"]]]
        self._dtype = case.parameters["dtype"]
        counts = tuple(tensor.numel() for tensor in self._tensors)
        offsets = tuple(accumulate(counts, initial=0))
        self._flat = torch.zeros(offsets[-1], dtype=_DTYPES[self._dtype])
        self._slots = [
            self._flat[start : start + tensor.numel()].view(tensor.shape)
            for start, tensor in zip(offsets, self._tensors, strict=False)
        ]
        self._lines = [tensor.view(-1) for tensor in self._tensors]
        self._table = packing.Table(counts, offsets[:-1])
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._source, self._copy = np.ones(offsets[-1], np.float32), np.zeros(offsets[-1], np.float32)
        # Rounded by torch, to nearest and ties to even.
        self._expected = torch.cat(self._lines).to(self._flat.dtype)

    def contenders(self) -> list[Contender]:
        check = self._check_pack if self._packs else self._check_unpack
        ways = self._ways_to_pack() if self._packs else self._ways_to_unpack()
        ours = [Contender(name, run, lambda run=run: check(run)) for name, run in ways.items()]  # type: ignore[misc]
        return [Contender(targets.MEMCPY, self._memcpy, self._check_memcpy), *ours]

    def _ways_to_pack(self) -> dict[str, Callable[[], Any]]:
        flat, tensors = self._flat, self._tensors
        flatten: Callable[[list[torch.Tensor]], torch.Tensor] = torch._utils._flatten_dense_tensors
        return {
            targets.PACK: lambda: packing.pack(tensors, flat),
            targets.TABLE: lambda: self._table.gather(self._addresses, "float32", flat.data_ptr(), self._dtype),
            targets.FLATTEN: lambda: flatten(tensors).to(flat.dtype),
            targets.CAT: lambda: torch.cat(self._lines, out=flat),
            targets.FOREACH: lambda: torch._foreach_copy_(self._slots, tensors),
        }

    def _ways_to_unpack(self) -> dict[str, Callable[[], Any]]:
        flat, tensors = self._flat, self._tensors
        return {
            targets.UNPACK: lambda: packing.unpack(flat, tensors),
            targets.TABLE: lambda: self._table.scatter(self._addresses, "float32", flat.data_ptr(), self._dtype),
            targets.FOREACH: lambda: torch._foreach_copy_(tensors, self._slots),
        }

    def _memcpy(self) -> None:
        """Copies as many float32 elements as the tensors have."""
        np.copyto(self._copy, self._source)

    def _check_memcpy(self) -> str:
        self._copy[:] = 0
        self._memcpy()
        return "" if (self._copy == 1).all() else "the copy differs"

    def _check_pack(self, run: Callable[[], Any]) -> str:
        self._flat.fill_(torch.nan)
        returned = run()
        found = returned if isinstance(returned, torch.Tensor) else self._flat
        return "" if torch.equal(found, self._expected) else "the flat buffer differs from the tensors"

    def _check_unpack(self, run: Callable[[], Any]) -> str:
        self._flat.copy_(self._expected)
        for tensor in self._tensors:
            tensor.fill_(torch.nan)
        run()
        wrong = not torch.equal(torch.cat(self._lines), self._expected.float())
        return "the tensors differ from the flat buffer" if wrong else ""
