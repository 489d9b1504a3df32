"""The only importer of the CUDA library: loads it, calls it without the GIL, raises on bad statuses.

What the calls do stands in csrc/include/mpidl_cuda.h. Never run on hardware; the tests load the same source compiled
for the host, with a runtime that is as late as CUDA may be.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mpidl.errors import DeviceError, ExtensionError
from mpidl.native import library as _native

_INTERFACE = 1
_OWN_STATUSES, _FIRST_CUDA_ERROR = 100, 1000  # below the first they are csrc/include/mpidl.h's

#: Calls of one table that can be under way: a result must be read before as many further calls.
SLOTS: Final = 4
ADVICE = "install mpidl again where CUDA's nvcc is found (PATH or CUDA_HOME), with MPIDL_CUDA=1"


class Cuda:
    """A loaded library.

    Args:
        path: the shared library.

    Raises:
        ExtensionError: it was never built, cannot be loaded, or belongs to another version of the package.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ExtensionError(f"mpidl was built without CUDA, so arrays on a device cannot be used: {ADVICE}")
        try:
            _native.library()  # which has the declarations
            self._library: Any = _native.ffi.dlopen(str(path))
            found = self._library.mpidl_cuda_interface()
        except (OSError, AttributeError) as error:
            raise ExtensionError(f"mpidl's CUDA library cannot be loaded ({error}): {ADVICE}") from error
        if found != _INTERFACE:
            raise ExtensionError(f"mpidl's CUDA library has interface {found}, not {_INTERFACE}: {ADVICE}")

    def call(self, name: str, device: int, *arguments: int) -> None:
        """Calls what returns nothing but a status."""
        self._check(name, getattr(self._library, f"mpidl_cuda_{name}")(device, *arguments))

    def make(self, name: str, device: int, *arguments: int) -> int:
        """Calls what makes or asks for something; returns its address or value."""
        what = _native.ffi.new("int *" if name == "event_done" else "uintptr_t *")
        self._check(name, getattr(self._library, f"mpidl_cuda_{name}")(device, *arguments, what))
        return int(what[0])

    def _check(self, name: str, status: int) -> None:
        if status >= _FIRST_CUDA_ERROR:
            text = _native.ffi.string(self._library.mpidl_cuda_describe(status)).decode()
            raise DeviceError(f"CUDA failed in mpidl_cuda_{name}: {text} (error {status - _FIRST_CUDA_ERROR})")
        if status:
            raise DeviceError(f"mpidl_cuda_{name} returned the status {status}")


class Segments:
    """The frozen half of a segment table on a device; calls are numbered by tickets.

    Args:
        cuda: the library.
        device: number of the device.
        counts, offsets: elements of each segment, and where it lies in the flat buffer.
    """

    def __init__(self, cuda: Cuda, device: int, counts: Sequence[int], offsets: Sequence[int]) -> None:
        self._cuda, self._count = cuda, len(counts)
        made = _native.ffi.new("mpidl_cuda_table **")
        sizes, places = _native.ffi.new("int64_t[]", counts), _native.ffi.new("int64_t[]", offsets)
        cuda._check("table_make", cuda._library.mpidl_cuda_table_make(device, len(counts), sizes, places, made))
        self._table = made[0]

    def gather(
        self, addresses: Sequence[int], source: str, flat: int, flat_dtype: str, *, scale: float, stream: int
    ) -> int:
        """Packs in stream order; returns the ticket by which the result can be asked for."""
        return self._move("gather", addresses, (source, flat_dtype), flat, scale, stream)

    def scatter(
        self, addresses: Sequence[int], target: str, flat: int, flat_dtype: str, *, scale: float, stream: int
    ) -> int:
        """Unpacks in stream order; returns what `gather` does."""
        return self._move("scatter", addresses, (target, flat_dtype), flat, scale, stream)

    def result(self, ticket: int) -> tuple[int, float, bool]:
        """Waits for a call; returns elements written, the sum of their squares, whether all are finite."""
        packed = _native.ffi.new("mpidl_packed *")
        self._cuda._check("result", self._cuda._library.mpidl_cuda_result(self._table, ticket, packed))
        return packed.count, packed.sum_of_squares, bool(packed.finite)

    def _move(  # noqa: PLR0917
        self, name: str, addresses: Sequence[int], dtypes: tuple[str, str], flat: int, scale: float, stream: int
    ) -> int:
        _native.check_call(self._count, addresses, *dtypes)
        pointers, ticket = _native.ffi.new("uintptr_t[]", addresses), _native.ffi.new("int64_t *")
        codes = [_native.DTYPES.get(dtype, -1) for dtype in dtypes]
        move = getattr(self._cuda._library, f"mpidl_cuda_{name}")
        status = move(self._table, pointers, codes[0], flat, codes[1], scale, stream, ticket)
        if 0 < status < _OWN_STATUSES:
            source, out = dtypes if name == "gather" else reversed(dtypes)
            _native.fail(status, source, out, scale)
        self._cuda._check(name, status)
        return int(ticket[0])

    def free(self) -> None:
        """Gives the table's memory back, once its calls are through; harmless the second time."""
        table, self._table = self._table, _native.ffi.NULL
        self._cuda._check("table_free", self._cuda._library.mpidl_cuda_table_free(table))


@functools.cache
def library() -> Cuda:
    """The CUDA library that was built with the package; raises as `Cuda` does."""
    return Cuda(Path(__file__).with_name("_mpidl_cuda.so"))
