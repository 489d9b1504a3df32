"""How tensors travel between ranks: as bytes, or as a mean; any dense tensor, and what refuses the others by name.

A buffer may be expanded or overlapping, of an 8-bit floating dtype or complex. Each is sent as its elements in logical
order, so that strides may differ between ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mpidl.arrays import devices
from mpidl.arrays import view as arrays
from mpidl.arrays.view import ArrayView
from mpidl.errors import DtypeError
from mpidl.mpi import topology
from mpidl.mpi.topology import Topology

_SPARSE = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def refuse(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor whose elements cannot be read.

    Args:
        name: of the tensor, for the message, such as "buffer mask".
        tensor: any.

    Raises:
        DtypeError: the tensor is nested, quantized, on a device that cannot be used, or of a layout or dtype that
            cannot be read.
    """
    found = ""
    if tensor.is_nested:
        found = "is a nested tensor"
    elif tensor.is_quantized:
        found = "is a quantized tensor"
    elif not (tensor.is_cpu or tensor.is_cuda):
        found = f"is on device {tensor.device}"
    elif tensor.layout is not torch.strided and not is_sparse(tensor):
        found = f"has the layout {str(tensor.layout).removeprefix('torch.')}"
    else:
        try:
            torch.empty(0, dtype=tensor.dtype).view(torch.uint8)
        except RuntimeError:
            found = f"has elements of dtype {str(tensor.dtype).removeprefix('torch.')}"
    if found:
        raise DtypeError(
            f"{name} {found}, which mpidl cannot send to other ranks: keep it as a plain attribute of the module, or "
            "as a dense tensor"
        )


def is_sparse(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is sparse: ranks compare such a tensor, and never send it."""
    return tensor.layout in _SPARSE


def is_mean(tensor: torch.Tensor) -> bool:
    """Returns whether a mean of such tensors over ranks makes sense: floating or complex, and dense."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not is_sparse(tensor)


def checksum(tensor: torch.Tensor) -> int:
    """Returns a 32-bit number that differs, with all likelihood, where shape, dtype or some bit of tensors differs."""
    found = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    parts = [tensor]
    if is_sparse(tensor):
        whole = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor
        parts = [getattr(whole, part)() for part in _SPARSE[tensor.layout]]
    for part in parts:
        found = zlib.crc32(np.asarray(on_host(as_bytes(part)).owner).data, found)
    return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a dense tensor's elements in logical order as flat bytes: its own memory, if the elements lie so."""
    if not tensor.numel():  # whose strides may be any
        return torch.empty(0, dtype=torch.uint8)
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copies values into a tensor; elements that share a place in memory must have equal values."""
    target = tensor.detach()
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if not _overlaps(target):
            target.copy_(values)
            return
        span = 1 + sum((size - 1) * step for size, step in zip(target.shape, target.stride(), strict=True))
        memory = target.as_strided((span,), (1,))
        places = torch.arange(span, device=target.device).as_strided(target.shape, target.stride())
        memory[places.reshape(-1)] = values.to(memory.dtype).reshape(-1)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Returns whether some elements may share a place in memory, as in an expanded tensor or sliding windows."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def broadcast(ranks: Topology, tensors: Iterable[torch.Tensor], root: int, what: str) -> None:
    """Copies root's dense tensors to every rank, in place; a collective.

    Args:
        ranks: who takes part.
        tensors: alike in number, shapes and dtypes on all ranks.
        root: whose values are copied.
        what: the call that waits, for messages.
    """
    for tensor in tensors:
        flat = as_bytes(tensor)
        if not flat.numel():
            continue
        sequence = ranks.begin()
        host = on_host(flat) if ranks.rank == root else host_for(flat)
        topology.wait_all(ranks, ranks.start_broadcast(host, root), what, sequence, (host, flat))
        if ranks.rank == root:
            continue
        back(host, flat)
        if flat.data_ptr() != tensor.data_ptr():
            write(tensor, flat.view(tensor.dtype).reshape(tensor.shape))
        elif not tensor.is_inference():
            torch.autograd.graph.increment_version([tensor.detach()])


def mean(ranks: Topology, tensor: torch.Tensor, weights: Sequence[float], what: str) -> None:
    """Makes a tensor its weighted mean over ranks, in place; a collective.

    Args:
        ranks: who takes part.
        tensor: floating or complex, alike in shape and dtype on all ranks.
        weights: one for each rank, alike on all ranks; equal ones, if all are 0. Of a rank of weight 0 not even a NaN
            counts.
        what: the call that waits, for messages.
    """
    if not tensor.numel():
        return
    if len(set(weights)) == 1:
        weights = [1.0] * ranks.size
    dense = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    wide = dense.to(torch.float64 if dense.dtype == torch.float64 else torch.float32).contiguous()
    mine = weights[ranks.rank]
    if mine != 1:
        wide = wide * mine if mine else torch.zeros_like(wide)
    total = torch.empty_like(wide)
    sequence = ranks.begin()
    send, receive = on_host(wide), host_for(total)
    requests = ranks.start_allreduce(send, receive, "sum")
    topology.wait_all(ranks, requests, what, sequence, (send, receive, wide, total))
    back(receive, total)
    total /= sum(weights)
    write(tensor, torch.view_as_complex(total) if tensor.is_complex() else total)


def on_host(tensor: torch.Tensor) -> ArrayView:
    """Returns a dense tensor's memory if the tensor lies in host memory, or else a copy in host memory."""
    view = arrays.view(tensor)
    if view.device == "cpu":
        return view
    host, copied = devices.of(view).fetch(view)
    copied.wait()
    return host


def host_for(tensor: torch.Tensor) -> ArrayView:
    """Returns host memory to receive a dense tensor's elements: the tensor's own memory, if that is host memory."""
    view = arrays.view(tensor)
    return view if view.device == "cpu" else devices.of(view).like(view, view.shape)


def back(host: ArrayView, tensor: torch.Tensor) -> None:
    """Copies elements received in `host_for(tensor)` into the tensor, in the order of its device's stream."""
    view = arrays.view(tensor)
    if view.device != "cpu":
        devices.of(view).deliver(host, view)
