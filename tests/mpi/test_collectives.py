"""Every collective on every dtype, kind of array and op, against numpy over all ranks' known inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from known import ARRAYS, COMPLEX, OPS, WHOLE, assert_same, defined, make, own, reduced, values

import mpidl

WITH_OTHERS = True

REDUCED = [(kind, dtype) for kind, dtype in ARRAYS if dtype != "bool"]
COUNTS = (1, 5, 0, 1000)


def all_inputs(size: int, count: int, dtype: str, op: str) -> list[np.ndarray[Any, Any]]:
    return [values(rank, count, dtype, op) for rank in range(size)]


@pytest.mark.parametrize(("kind", "dtype"), REDUCED)
def test_allreduce(comm: mpidl.Communicator, kind: str, dtype: str) -> None:
    for op in (op for op in OPS if defined(op, dtype)):
        for count in COUNTS:
            x = own(kind, dtype, comm.rank, count, op)
            expected = reduced(op, all_inputs(comm.size, count, dtype, op), kind, dtype)
            assert_same(comm.allreduce(x, op=op), expected)
            assert_same(x, own(kind, dtype, comm.rank, count, op))  # the input is left alone
            out = make(kind, dtype, np.zeros(count))
            assert comm.allreduce(x, op=op, out=out) is out
            assert_same(out, expected)
            assert comm.allreduce(x, op=op, out=x) is x  # in place
            assert_same(x, expected)


@pytest.mark.parametrize(("kind", "dtype"), REDUCED)
def test_reduce_to_every_root(comm: mpidl.Communicator, kind: str, dtype: str) -> None:
    for root in range(comm.size):
        for op in (op for op in OPS if defined(op, dtype)):
            for count in (7, 0):
                x = own(kind, dtype, comm.rank, count, op)
                result = comm.reduce(x, op=op, root=root, out=x if count else None)
                if comm.rank == root:
                    assert_same(result, reduced(op, all_inputs(comm.size, count, dtype, op), kind, dtype))
                else:
                    assert result is None
                    assert_same(x, own(kind, dtype, comm.rank, count, op))


@pytest.mark.parametrize(("kind", "dtype"), REDUCED)
def test_reduce_scatter(comm: mpidl.Communicator, kind: str, dtype: str) -> None:
    for op in (op for op in OPS if defined(op, dtype)):
        for block in (3, 0):
            count = block * comm.size
            whole = reduced(op, all_inputs(comm.size, count, dtype, op), kind, dtype)
            result = comm.reduce_scatter(own(kind, dtype, comm.rank, count, op), op=op)
            assert_same(result, whole[comm.rank * block : (comm.rank + 1) * block])
    rows = own(kind, dtype, comm.rank, 6 * comm.size).reshape(2 * comm.size, 3)
    whole = reduced("sum", all_inputs(comm.size, 6 * comm.size, dtype, "sum"), kind, dtype).reshape(2 * comm.size, 3)
    assert_same(comm.reduce_scatter(rows), whole[2 * comm.rank : 2 * comm.rank + 2])


@pytest.mark.parametrize(("kind", "dtype"), ARRAYS)
def test_movement_of_data(comm: mpidl.Communicator, kind: str, dtype: str) -> None:
    size, rank = comm.size, comm.rank
    for count in (6, 0):
        for root in range(size):
            x = own(kind, dtype, rank, count)
            assert comm.broadcast(x, root=root) is x
            assert_same(x, own(kind, dtype, root, count))
        shape = (2, count // 2)
        gathered = comm.allgather(own(kind, dtype, rank, count).reshape(shape))
        assert_same(
            gathered, make(kind, dtype, np.stack([values(r, count, dtype).reshape(shape) for r in range(size)]))
        )
        block = count // 2
        blocks = [values(r, size * block, dtype)[rank * block : (rank + 1) * block] for r in range(size)]
        assert_same(comm.alltoall(own(kind, dtype, rank, size * block)), make(kind, dtype, np.concatenate(blocks)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_summed_in_float32(comm: mpidl.Communicator, dtype: str) -> None:
    """In the half type itself each single 1 would vanish beside the large number, and the sum overflow to infinity."""
    large = 2048.0 if dtype == "float16" else 256.0
    x = make("torch", dtype, np.array([large if comm.rank == 0 else 1.0]))
    assert_same(comm.allreduce(x), make("torch", dtype, np.array([large + comm.size - 1])))
    x = make("torch", "float16", np.array([60000.0]))
    assert_same(comm.allreduce(x, op="mean"), x)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_zero_dimensions(comm: mpidl.Communicator, kind: str) -> None:
    x = make(kind, "float32", np.array(float(comm.rank + 1)))
    assert_same(comm.allreduce(x), make(kind, "float32", np.array(sum(range(1, comm.size + 1)))))
    gathered = comm.allgather(x)
    assert_same(gathered, make(kind, "float32", np.arange(1.0, comm.size + 1)))
    assert_same(comm.broadcast(x, root=comm.size - 1), make(kind, "float32", np.array(float(comm.size))))
    with pytest.raises(mpidl.ArgumentError, match="first dimension"):
        comm.alltoall(x)


@pytest.mark.parametrize(("kind", "dtype"), [("numpy", "float32"), ("torch", "bfloat16"), ("torch", "complex64")])
def test_strided_arrays(comm: mpidl.Communicator, kind: str, dtype: str) -> None:
    def grid(rank: int) -> Any:
        return values(rank, 24, dtype).reshape(4, 6)

    def every_other(wide: np.ndarray[Any, Any]) -> Any:
        return make(kind, dtype, wide)[:, ::2]

    x = every_other(grid(comm.rank))
    expected = make(kind, dtype, sum(grid(r)[:, ::2] for r in range(comm.size)))
    assert_same(comm.allreduce(x), expected)
    base = make(kind, dtype, np.zeros((4, 6)))
    out = base[:, ::2]
    assert comm.allreduce(x, out=out) is out
    assert_same(make("numpy", "bool", np.array(base[:, 1::2].sum().item() != 0)), np.array(False))  # gaps untouched
    assert_same(make_dense(out), expected)
    assert comm.allreduce(x, out=x) is x
    assert_same(make_dense(x), expected)
    x = every_other(grid(comm.rank))
    comm.broadcast(x, root=comm.size - 1)
    assert_same(make_dense(x), make(kind, dtype, grid(comm.size - 1)[:, ::2]))
    assert_same(comm.allgather(every_other(grid(comm.rank)).T)[-1], make(kind, dtype, grid(comm.size - 1)[:, ::2].T))


def make_dense(x: Any) -> Any:
    return x.contiguous() if isinstance(x, torch.Tensor) else x.copy()


def test_out_that_overlaps_x_in_part(comm: mpidl.Communicator) -> None:
    base = np.arange(10.0) * (comm.rank + 1)
    comm.allreduce(base[:8], out=base[2:])
    assert_same(base[2:], np.arange(8.0) * sum(range(1, comm.size + 1)))


def test_tensors_with_gradients_come_back_detached(comm: mpidl.Communicator) -> None:
    x = torch.full((3,), float(comm.rank + 1), requires_grad=True)
    for result in (
        comm.allreduce(x),
        comm.allreduce(x * 1),
        comm.allgather(x),
        comm.reduce_scatter(x.repeat(comm.size)),
    ):
        assert not result.requires_grad
        assert result.grad_fn is None
    before = x._version
    assert comm.broadcast(x, root=0) is x
    assert_same(x.detach(), torch.ones(3))
    assert x.requires_grad
    assert x.is_leaf
    assert comm.rank == 0 or x._version > before


def test_a_tensor_that_autograd_has_saved_may_not_change_unseen(comm: mpidl.Communicator) -> None:
    x = torch.full((3,), float(comm.rank + 1), requires_grad=True)
    out = torch.zeros(3)
    loss = (x * out).sum()
    comm.allreduce(torch.ones(3), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_read_only_arrays(comm: mpidl.Communicator) -> None:
    x = np.full(4, comm.rank + 1.0)
    x.flags.writeable = False
    expected = np.full(4, float(sum(range(1, comm.size + 1))))
    assert_same(comm.allreduce(x), expected)
    with pytest.raises(mpidl.ArgumentError, match="out is read-only"):
        comm.allreduce(x, out=x)
    if comm.size > 1:
        with pytest.raises(mpidl.MpidlError, match="x is read-only" if comm.rank else "refused its arguments"):
            comm.broadcast(x, root=0)
    expanded = torch.ones(1).expand(4)
    with pytest.raises(mpidl.ArgumentError, match="out is read-only"):
        comm.allreduce(torch.ones(4), out=expanded)
    assert_same(comm.allreduce(expanded), torch.full((4,), float(comm.size)))


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (np.zeros(4, np.float32), "out has dtype float32; expected float64"),
        (np.zeros(5), "out has shape"),
        (np.zeros((2, 2)), "out has shape"),
        (torch.zeros(4, dtype=torch.float64), "out has kind torch; expected numpy"),
    ],
)
def test_out_that_does_not_fit_is_refused(comm: mpidl.Communicator, out: Any, says: str) -> None:
    with pytest.raises(mpidl.ArgumentError, match=says):
        comm.allreduce(np.ones(4), out=out)
    with pytest.raises(mpidl.ArgumentError, match=says):
        comm.reduce(np.ones(4), out=out)
    assert_same(comm.allreduce(np.ones(4)), np.full(4, float(comm.size)))


def test_what_has_no_meaning_is_refused(comm: mpidl.Communicator) -> None:
    for dtype in WHOLE:
        with pytest.raises(mpidl.DtypeError, match=f"the mean of {dtype} would be truncated"):
            comm.allreduce(np.ones(3, dtype), op="mean")
    for dtype in COMPLEX:
        with pytest.raises(mpidl.DtypeError, match="has no order"):
            comm.reduce_scatter(np.ones(comm.size, dtype), op="max")
    with pytest.raises(mpidl.DtypeError, match="bool cannot be reduced"):
        comm.allreduce(np.ones(3, bool))
    with pytest.raises(mpidl.ArgumentError, match="op is 'average'"):
        comm.reduce(np.ones(3), op="average")
    for root in (-1, comm.size, "0", None):
        with pytest.raises(mpidl.ArgumentError, match="root is"):
            comm.broadcast(np.ones(3), root=root)  # type: ignore[arg-type]
        with pytest.raises(mpidl.ArgumentError, match="root is"):
            comm.reduce(np.ones(3), root=root)  # type: ignore[arg-type]
    for x in ([1.0], 1.0, np.float64(1), None, torch.eye(2).to_sparse()):
        with pytest.raises(mpidl.DtypeError, match="x "):
            comm.allreduce(x)
    if comm.size > 1:
        for call in (comm.alltoall, comm.reduce_scatter):
            with pytest.raises(mpidl.ArgumentError, match="first dimension must be a multiple"):
                call(np.ones(comm.size + 1))
    assert_same(comm.allreduce(np.ones(4)), np.full(4, float(comm.size)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_are_bitwise_equal_on_all_ranks(comm: mpidl.Communicator, dtype: str) -> None:
    for count in (3, 4097, 100_000):
        inputs = [np.random.default_rng(rank).standard_normal(count) for rank in range(comm.size)]
        result = comm.allreduce(inputs[comm.rank].astype(dtype))
        assert np.allclose(result, sum(inputs), rtol=1e-5, atol=1e-4)
        everyone = comm.allgather(result).view(np.uint8).reshape(comm.size, -1)
        assert (everyone == everyone[0]).all()
