"""cupy arrays in every call, staged and directly: cupy is a stand-in on the host's CUDA, see tests/cuda_host."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import known
import numpy as np
import pytest
from copies import copied

import mpidl
from mpidl.arrays import view
from mpidl.mpi import cuda_aware

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_host"))
from fake_cupy import stand_in
from host_build import copies, shared

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 4)
DTYPES = ("float32", "float64", "float16", "int32", "complex64")


@pytest.fixture
def comm(comm, monkeypatch) -> Iterator[mpidl.Communicator]:
    """One that leaves all data to MPI, as where ranks do not share memory, or some rank asks for direct transfers."""
    with copied(comm, monkeypatch, "MPIDL_SHARED_MEMORY", 0) as copy:
        yield copy


@pytest.fixture(params=["staged", "direct"])
def cupy(request, monkeypatch) -> Iterator[ModuleType]:
    """cupy, and MPI either never touches its memory or always."""
    monkeypatch.setattr(cuda_aware, "_decisions", weakref.WeakKeyDictionary())
    monkeypatch.setenv("MPIDL_CUDA_AWARE", "1" if request.param == "direct" else "0")
    with stand_in() as module, shared() if request.param == "direct" else contextlib.nullcontext():
        yield module


def same(found, expected) -> None:
    """The kind is cupy's, the rest as expected of numpy."""
    assert view.view(found).kind == "cupy"
    known.assert_same(found.get(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(comm, cupy, dtype):
    for op in known.OPS:
        if not known.defined(op, dtype):
            continue
        expected = known.reduced(op, [known.values(r, 101, dtype, op) for r in range(comm.size)], "numpy", dtype)
        x = cupy.asarray(known.own("numpy", dtype, comm.rank, 101, op))
        same(comm.allreduce(x, op), expected)
        same(x, known.own("numpy", dtype, comm.rank, 101, op))
        assert comm.allreduce(x, op, out=x) is x
        same(x, expected)
    inputs = [known.values(r, 5 * comm.size, dtype) for r in range(comm.size)]
    x, total = cupy.asarray(known.make("numpy", dtype, inputs[comm.rank])), known.reduced("sum", inputs, "numpy", dtype)
    root = comm.reduce(x, root=comm.size - 1)
    if comm.rank == comm.size - 1:
        same(root, total)
    same(comm.reduce_scatter(x), total[5 * comm.rank : 5 * comm.rank + 5])


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_moves(comm, cupy, dtype):
    inputs = [known.own("numpy", dtype, rank, 6 * comm.size) for rank in range(comm.size)]
    x = cupy.asarray(inputs[comm.rank])
    same(comm.allgather(x), np.stack(inputs))
    same(comm.alltoall(x), np.concatenate([one[6 * comm.rank : 6 * comm.rank + 6] for one in inputs]))
    assert comm.broadcast(x, root=comm.size - 1) is x
    same(x, inputs[-1])


def test_strided_arrays(comm, cupy):
    host = np.arange(12.0).reshape(3, 4) * (comm.rank + 1)
    whole = cupy.asarray(host)
    same(comm.allreduce(whole.T), np.arange(12.0).reshape(3, 4).T * sum(range(1, comm.size + 1)))
    comm.broadcast(whole[:, 1], root=comm.size - 1)
    host[:, 1] = np.array([1.0, 5.0, 9.0]) * comm.size
    same(whole, host)


def test_empty_arrays(comm, cupy):
    same(comm.allreduce(cupy.asarray(np.zeros(0, np.float16))), np.zeros(0, np.float16))
    same(comm.allgather(cupy.asarray(np.zeros((0, 3)))), np.zeros((comm.size, 0, 3)))


def test_packing_and_a_reduction_follow_cupys_current_stream(comm, cupy, request):
    """Nothing is waited for in between; on any other stream than cupy's the sum would be of what was there before."""
    tensors = [cupy.asarray(np.full(n, comm.rank + 1, np.float32)) for n in (3, 50)]
    flat = cupy.asarray(np.zeros(53, np.float32))
    mpidl.pack(tensors, flat, scale=2.0)
    before = copies()
    total = comm.allreduce(flat)
    assert copies() - before == (0 if request.node.callspec.params["cupy"] == "direct" else 2)
    mpidl.unpack(total, tensors, scale=0.5)
    for tensor in tensors:
        same(tensor, np.full(tensor.shape, sum(range(1, comm.size + 1)), np.float32))
