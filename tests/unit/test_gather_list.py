"""Parts of scattered data, side by side: against numpy on the same data flat."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.arrays import view
from mpidl.arrays.packing import Table
from mpidl.collectives.gather_list import GatherList, cut


@pytest.mark.parametrize("counts", [(60,), (7, 0, 13, 40), (1,) * 60, (0, 59, 1, 0)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_parts_of_blocks_are_those_of_flat_data(counts: tuple[int, ...], dtype: str) -> None:
    flat = np.arange(60).astype(dtype)
    offsets = tuple(int(n) for n in np.cumsum((0, *counts[:-1])))
    missing = len(counts) - 1  # read as zeros
    pieces = [flat[at : at + count].copy() for at, count in zip(offsets, counts, strict=True)]
    addresses = [0 if s == missing else piece.ctypes.data for s, piece in enumerate(pieces)]
    expected = flat.copy()
    expected[offsets[missing] :] = 0
    source = GatherList(Table(counts, offsets), addresses, dtype, 1.0, pieces)
    for blocks, length in (((0, 1, 2, 3), 15), ((3, 0), 15), ((0,), 60), ((1, 0, 2), 20), ((), 15)):
        for start, stop in ((0, length), (4, 11), (0, 0), (14, 15)):
            part = cut(source.table, length, blocks, start, stop).of(source)
            out = np.empty(len(blocks) * (stop - start), dtype)
            assert part.gather(view.view(out))
            rows = [expected[block * length + start : block * length + stop] for block in blocks]
            assert np.array_equal(out, np.concatenate([np.empty(0, dtype), *rows]))
