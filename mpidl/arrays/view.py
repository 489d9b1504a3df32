"""One view of a numpy, torch or cupy array: where its memory lies, what is in it; and what differs by kind.

torch and cupy are found among the loaded modules, never imported: who holds such an array has them.
The cupy path has never run on hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from mpidl.errors import ArgumentError, DtypeError

ITEMSIZES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
_NUMPY_NAMES = {np.dtype(name): name for name in ITEMSIZES if name != "bfloat16"}
_TORCH_NAMES: dict[Any, str] = {}


class ArrayView(NamedTuple):  # made several times as fast as a frozen dataclass: thousands of tensors are looked at
    """The memory of an array. `count` is elements; `owner`, if torch's detached, keeps it alive."""

    owner: Any
    address: int
    count: int  # type: ignore[assignment]  # the field is wanted more than tuple's method
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    contiguous: bool
    writable: bool
    device: str
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, without the gaps of a strided array."""
        return self.count * self.itemsize


def view(x: object, name: str = "x") -> ArrayView:
    """Look at an array; nothing is copied.

    Args:
        x: a numpy array, a dense torch tensor (taken detached) or a cupy array.
        name: what messages call it.

    Raises:
        DtypeError: anything else, or a dtype that is not in `ITEMSIZES` or not in native byte order.
    """
    if isinstance(x, np.ndarray):
        return _view_numpy(x, name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _view_torch(x, name, torch)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _view_cupy(x, name)
    raise DtypeError(f"{name} must be a numpy array, a torch tensor or a cupy array, not {_described(x)}")


def _described(x: object) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("a builtins.", "a ")


def _view_numpy(x: np.ndarray[Any, Any], name: str) -> ArrayView:
    dtype = _NUMPY_NAMES.get(x.dtype)
    if dtype is None:
        raise DtypeError(f"{name} has elements of dtype {x.dtype!s}, which mpidl does not take")
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{name} is a masked array: pass its .data, or .filled(...)")
    flags = x.flags
    return ArrayView(
        x,
        x.__array_interface__["data"][0],
        x.size,
        dtype,
        x.itemsize,
        x.shape,
        flags.c_contiguous,
        flags.writeable,
        "cpu",
        "numpy",
    )


def _torch_name(dtype: Any, name: str) -> str:
    short = str(dtype).removeprefix("torch.")
    if short not in ITEMSIZES:
        raise DtypeError(f"{name} has elements of dtype {short}, which mpidl does not take")
    _TORCH_NAMES[dtype] = short
    return short


def _view_torch(x: Any, name: str, torch: Any) -> ArrayView:
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise DtypeError(f"{name} is a sparse or nested tensor ({layout}): mpidl takes dense ones")
    if not (x.is_cpu or x.is_cuda):
        raise DtypeError(f"{name} is on device {x.device}: mpidl takes tensors on cpu and cuda")
    if x.is_neg() or x.is_conj():
        raise DtypeError(f"{name} is a lazy view: pass {name}.resolve_neg().resolve_conj()")
    dtype = _TORCH_NAMES.get(x.dtype) or _torch_name(x.dtype, name)
    tensor = x.detach() if x.requires_grad else x
    address, count = tensor.data_ptr(), tensor.numel()
    if count and not address:
        raise DtypeError(f"{name} is a {type(x).__qualname__} without memory of its own")
    contiguous = tensor.is_contiguous()
    return ArrayView(
        tensor,
        address,
        count,
        dtype,
        ITEMSIZES[dtype],
        tuple(tensor.shape),
        contiguous,
        contiguous or _spread(tensor),
        _torch_device(tensor),
        "torch",
    )


def _torch_device(tensor: Any) -> str:
    return "cpu" if tensor.is_cpu else str(tensor.device)  # the latter takes a microsecond


def _spread(tensor: Any) -> bool:
    """Whether every element has a place of its own, as far as strides of zero tell (expand)."""
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _view_cupy(x: Any, name: str) -> ArrayView:
    dtype = _NUMPY_NAMES.get(x.dtype)
    if dtype is None:
        raise DtypeError(f"{name} has elements of dtype {x.dtype!s}, which mpidl does not take")
    return ArrayView(
        x,
        x.data.ptr,
        x.size,
        dtype,
        x.itemsize,
        x.shape,
        x.flags.c_contiguous,
        True,
        f"cuda:{x.device.id}",
        "cupy",
    )


def extent(array: ArrayView) -> tuple[int, int]:
    """The bytes that the array spans, gaps included: first address and the one past the last."""
    if array.contiguous or not array.count:
        return array.address, array.address + array.nbytes
    unit = array.itemsize if array.kind == "torch" else 1
    strides = array.owner.stride() if array.kind == "torch" else array.owner.strides
    reach = [(size - 1) * stride * unit for size, stride in zip(array.shape, strides, strict=True)]
    low = array.address + sum(step for step in reach if step < 0)
    return low, array.address + sum(step for step in reach if step > 0) + array.itemsize


class Plain(NamedTuple):
    """Arrays that differ in address and count only: contiguous, writable, of one dtype, in host memory."""

    dtype: str
    addresses: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]


def plain(tensors: Sequence[Any]) -> Plain | None:
    """Look at many torch tensors at once, in less than half the time that `view` takes for each.

    Returns:
        None if there is none, or some are not plain: then `view` says of each what it is, or what is wrong with it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not tensors or not {*map(type, tensors)} <= {torch.Tensor, torch.nn.Parameter}:
        return None
    alike = {*map(attrgetter("dtype", "layout", "is_nested"), tensors)}
    dtype, layout, nested = next(iter(alike))
    name = str(dtype).removeprefix("torch.")
    if len(alike) > 1 or layout is not torch.strided or nested or name not in ITEMSIZES or dtype.is_complex:
        return None  # what is not complex is no lazy conjugate
    one = torch.Tensor
    if any(map(one.is_neg, tensors)) or not all(map(one.is_contiguous, tensors)):
        return None
    if {*map(_torch_device, tensors)} != {"cpu"}:
        return None
    addresses = np.fromiter(map(one.data_ptr, tensors), np.int64, len(tensors))
    counts = np.fromiter(map(one.numel, tensors), np.int64, len(tensors))
    return Plain(name, addresses, counts) if addresses[counts > 0].all() else None


def empty_like(x: object, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Any:
    """A new C-contiguous array of x's kind, dtype and device, outside autograd; `shape` and `dtype` replace x's."""
    array = view(x)
    wanted = array.shape if shape is None else shape
    if array.kind == "torch":
        return array.owner.new_empty(wanted, dtype=getattr(sys.modules["torch"], dtype or array.dtype))
    if array.kind == "numpy":
        return np.empty(wanted, dtype or array.dtype)
    with array.owner.device:  # cupy allocates on the current one
        return sys.modules["cupy"].empty(wanted, dtype=dtype or array.dtype)


def empty_flat(count: int, dtype: str) -> ArrayView:
    """New host memory for `count` elements, 1-D; numpy's bfloat16 lies in uint16."""
    owner = np.empty(count, "uint16" if dtype == "bfloat16" else dtype)
    address = owner.__array_interface__["data"][0]
    return ArrayView(owner, address, count, dtype, ITEMSIZES[dtype], (count,), True, True, "cpu", "numpy")


def contiguous(x: object) -> Any:
    """x itself if its elements lie densely in C order, otherwise a copy of the same kind that does."""
    array = view(x)
    if array.contiguous:
        return x
    return array.owner.contiguous() if array.kind == "torch" else array.owner.copy(order="C")


def copy_into(destination: object, source: object) -> None:
    """Copy all elements between arrays of one kind, dtype and shape, whatever their strides."""
    to, from_ = view(destination, "destination"), view(source, "source")
    if (to.kind, to.shape) != (from_.kind, from_.shape):
        raise ArgumentError(
            f"destination ({to.kind}, shape {to.shape}) and source ({from_.kind}, shape {from_.shape}) differ"
        )
    if to.dtype != from_.dtype:
        raise DtypeError(f"destination holds {to.dtype} and source {from_.dtype}")
    if not to.writable:
        raise ArgumentError("destination is read-only or has several elements in one place")
    if to.kind == "torch":
        to.owner.copy_(from_.owner)
    else:
        to.owner[...] = from_.owner


def divide(array: ArrayView, divisor: int) -> None:
    """Divides a dense array of floating or complex numbers in place; on a device in the order of its stream."""
    if array.device == "cpu":
        values = as_numpy(array)
        np.divide(values, divisor, out=values)
    elif array.kind == "torch":  # on CUDA torch would multiply by the reciprocal of a plain number
        array.owner.div_(array.owner.new_full((), divisor))
    else:
        array.owner[...] /= divisor


def as_numpy(array: ArrayView) -> np.ndarray[Any, Any]:
    """The memory of a contiguous CPU array as a flat numpy array; bfloat16 appears as uint16."""
    if not array.contiguous or array.device != "cpu":
        raise ArgumentError(f"only contiguous cpu memory can be shared with numpy, this is on {array.device}")
    if array.kind == "numpy":
        return np.asarray(array.owner).reshape(-1)
    owner = array.owner.view(sys.modules["torch"].uint16) if array.dtype == "bfloat16" else array.owner
    flat: np.ndarray[Any, Any] = owner.numpy().reshape(-1)
    return flat


def mark_written(array: ArrayView) -> None:
    """Tell autograd that memory was written behind its back: a stale saved tensor must raise, not lie."""
    if array.kind == "torch":
        mark_tensors_written([array.owner])


def mark_tensors_written(tensors: Iterable[Any]) -> None:
    """`mark_written`, of torch's tensors themselves."""
    for tensor in tensors:
        if not tensor.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(tensor)
