"""From a dtype's name to what MPI reduces it with; refuses what MPI would get wrong.

Half types have no MPI datatype: they are reduced in float32 (`accumulator`). Plain movement of data needs no datatype
and travels as bytes; it is not treated here.
"""

from __future__ import annotations

from typing import Any

from mpidl.errors import ArgumentError, DtypeError

OPERATIONS = ("sum", "mean", "min", "max", "prod")
HALF = ("float16", "bfloat16")

_FLOATING = ("float32", "float64")
_COMPLEX = ("complex64", "complex128")
_MPI_NAMES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int8": "INT8_T",
    "int16": "INT16_T",
    "int32": "INT32_T",
    "int64": "INT64_T",
    "uint8": "UINT8_T",
    "uint16": "UINT16_T",
    "uint32": "UINT32_T",
    "uint64": "UINT64_T",
    "complex64": "C_FLOAT_COMPLEX",
    "complex128": "C_DOUBLE_COMPLEX",
}
_MPI_OPERATIONS = {"sum": "SUM", "mean": "SUM", "min": "MIN", "max": "MAX", "prod": "PROD"}


def accumulator(dtype: str) -> str:
    """Returns the name of the dtype in which values of `dtype` are reduced."""
    return "float32" if dtype in HALF else dtype


def check(dtype: str, op: str) -> None:
    """Refuses a reduction that has no meaning, or that MPI would carry out wrongly.

    Raises:
        ArgumentError: `op` is not one of `OPERATIONS`.
        DtypeError: `dtype` cannot be reduced by `op`.
    """
    if op not in OPERATIONS:
        raise ArgumentError(f"op is {op!r}; expected one of {', '.join(OPERATIONS)}")
    if dtype == "bool":
        raise DtypeError("bool cannot be reduced: convert it to uint8 and use op='max' (any) or op='min' (all)")
    if dtype not in _MPI_NAMES and dtype not in HALF:
        raise DtypeError(f"{dtype} cannot be reduced: expected a float, complex or integer dtype")
    if dtype in _COMPLEX and op in ("min", "max"):
        raise DtypeError(f"{dtype} has no order: op={op!r} is not defined for it")
    if op == "mean" and dtype not in _FLOATING + _COMPLEX + HALF:
        raise DtypeError(f"the mean of {dtype} would be truncated: use op='sum', or convert to a float dtype")


def mpi_datatype(mpi: Any, dtype: str) -> Any:
    """Returns the predefined MPI datatype of an accumulator's dtype; `mpi` is the module `mpi4py.MPI`."""
    return getattr(mpi, _MPI_NAMES[dtype])


def mpi_operation(mpi: Any, op: str) -> Any:
    """Returns the MPI reduction behind `op`; a mean is a sum here, and is divided afterwards by the caller."""
    return getattr(mpi, _MPI_OPERATIONS[op])
