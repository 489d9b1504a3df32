"""What can be reduced by what, and in which dtype."""

from __future__ import annotations

import pytest

from mpidl.arrays.view import ITEMSIZES
from mpidl.errors import ArgumentError, DtypeError
from mpidl.mpi import datatypes

WHOLE = [name for name in ITEMSIZES if "int" in name]
COMPLEX = ["complex64", "complex128"]


def refused(dtype: str, op: str) -> bool:
    try:
        datatypes.check(dtype, op)
    except DtypeError as error:
        assert dtype in str(error)
        return True
    return False


def test_exactly_what_has_no_meaning_is_refused() -> None:
    found = {(dtype, op) for dtype in ITEMSIZES for op in datatypes.OPERATIONS if refused(dtype, op)}
    expected = {("bool", op) for op in datatypes.OPERATIONS}
    expected |= {(dtype, op) for dtype in COMPLEX for op in ("min", "max")}
    expected |= {(dtype, "mean") for dtype in WHOLE}
    assert found == expected


def test_unknown_names() -> None:
    with pytest.raises(ArgumentError, match="op is 'avg'; expected one of sum, mean, min, max, prod"):
        datatypes.check("float32", "avg")
    with pytest.raises(DtypeError, match="float8"):
        datatypes.check("float8_e4m3fn", "sum")


def test_half_types_are_reduced_in_float32_and_others_in_themselves() -> None:
    wide = {dtype: datatypes.accumulator(dtype) for dtype in ITEMSIZES}
    assert {dtype for dtype, accumulator in wide.items() if accumulator != dtype} == {"float16", "bfloat16"}
    assert wide["float16"] == wide["bfloat16"] == "float32"
