"""packing.Table: how segments lie in a flat buffer, and the two calls for a whole bucket."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.arrays import packing
from mpidl.errors import ArgumentError


def test_a_table_leaves_the_gaps_alone_and_is_a_value() -> None:
    table = packing.Table((2, 0, 3), (5, 9, 0))
    assert table == packing.Table((2, 0, 3), (5, 9, 0))
    assert hash(table) == hash(packing.Table((2, 0, 3), (5, 9, 0)))
    assert table.extent == 9
    a, c, flat = np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0]), np.full(9, -1.0)
    addresses = [a.ctypes.data, 0, c.ctypes.data]
    written = table.gather(addresses, "float64", flat.ctypes.data, "float64", 2.0)
    assert written == packing.Packed(5, 220.0, True)
    np.testing.assert_array_equal(flat, [6, 8, 10, -1, -1, 2, 4, -1, -1])
    table.scatter(addresses, "float64", flat.ctypes.data, "float64", 0.25)
    np.testing.assert_array_equal(np.concatenate([a, c]), [0.5, 1, 1.5, 2, 2.5])


@pytest.mark.parametrize(
    ("counts", "offsets", "words"),
    [
        ((1, 2), (0,), "1 entries"),
        ((-1,), (0,), "negative"),
        ((1,), (-1,), "negative"),
        ((3, 2), (0, 2), "overlaps"),
    ],
)
def test_tables_that_cannot_be_are_refused(counts: tuple[int, ...], offsets: tuple[int, ...], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        packing.Table(counts, offsets)
