"""What `mpidl.arrays.view` sees in numpy and torch arrays, and what it refuses by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mpidl.arrays import view
from mpidl.errors import ArgumentError, DtypeError


@pytest.mark.parametrize("dtype", view.ITEMSIZES)
def test_torch_tensors_of_every_dtype(dtype: str) -> None:
    x = torch.zeros(2, 3, dtype=getattr(torch, dtype))
    seen = view.view(x)
    assert (seen.address, seen.count, seen.dtype, seen.itemsize) == (x.data_ptr(), 6, dtype, x.element_size())
    assert (seen.shape, seen.contiguous, seen.writable, seen.device, seen.kind) == (
        (2, 3),
        True,
        True,
        "cpu",
        "torch",
    )
    assert seen.nbytes == x.nbytes


@pytest.mark.parametrize("dtype", [name for name in view.ITEMSIZES if name != "bfloat16"])
def test_numpy_arrays_of_every_dtype(dtype: str) -> None:
    x = np.zeros((2, 3), dtype)
    seen = view.view(x)
    assert (seen.address, seen.count, seen.dtype, seen.itemsize) == (x.ctypes.data, 6, dtype, x.itemsize)
    assert (seen.shape, seen.contiguous, seen.writable, seen.device, seen.kind) == (
        (2, 3),
        True,
        True,
        "cpu",
        "numpy",
    )
    assert seen.nbytes == x.nbytes


def test_scalars_of_dimension_zero_and_empty_arrays() -> None:
    for x in (np.array(3.0), torch.tensor(3.0)):
        assert (view.view(x).shape, view.view(x).count) == ((), 1)
        assert view.contiguous(x) is x
    for y in (np.zeros((0, 4)), torch.zeros(0, 4)):
        assert (view.view(y).count, view.view(y).contiguous) == (0, True)


def test_a_parameter_is_taken_detached() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    seen = view.view(parameter)
    assert seen.address == parameter.data_ptr()
    assert not seen.owner.requires_grad
    assert not view.empty_like(parameter).requires_grad


def test_strides_and_writability() -> None:
    assert not view.view(torch.zeros(4, 4).T).contiguous
    assert not view.view(np.zeros((4, 4)).T).contiguous
    assert view.view(torch.zeros(4, 4).T).writable
    assert not view.view(torch.zeros(1).expand(4)).writable
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    assert not view.view(frozen).writable


def quietly(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Without torch's notice that such tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([1.0, 2.0], "not a list"),
        (1.5, "not a float"),
        (np.float32(1.5), "not a numpy.float32"),
        (None, "NoneType"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([object()]), "dtype object"),
        (np.zeros(3, ">f4"), "dtype >f4"),
        (np.zeros(3, [("a", "f4")]), "dtype"),
        (np.ma.masked_array(np.zeros(3), [0, 1, 0]), "masked"),
        (torch.zeros(3).to_sparse(), "sparse"),
        (quietly(torch.zeros(3, 3).to_sparse_csr), "sparse_csr"),
        (torch.zeros(3, device="meta"), "meta"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "lazy"),
        (torch.zeros(3, dtype=torch.complex64).conj().imag, "lazy"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (quietly(lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])), "nested"),
    ],
)
def test_what_is_not_an_array_is_refused_by_name(x: object, words: str) -> None:
    with pytest.raises(DtypeError, match=words) as caught:
        view.view(x, "gradient")
    assert str(caught.value).startswith("gradient ")


@pytest.mark.parametrize("x", [np.arange(24).reshape(2, 3, 4)[:, ::2].T, torch.arange(24).reshape(2, 3, 4)[:, ::2].mT])
def test_contiguous_copies_in_logical_order(x: Any) -> None:
    dense = view.contiguous(x)
    assert view.view(dense).contiguous
    assert view.view(dense).kind == view.view(x).kind
    np.testing.assert_array_equal(np.asarray(dense), np.asarray(x))
    assert view.contiguous(dense) is dense


@pytest.mark.parametrize("x", [np.zeros((3, 4), np.float16).T, torch.zeros(3, 4, dtype=torch.bfloat16).T])
def test_empty_like_keeps_kind_and_dtype(x: Any) -> None:
    same, other = view.empty_like(x), view.empty_like(x, (7,))
    assert (type(same), same.dtype, tuple(same.shape)) == (type(x), x.dtype, (4, 3))
    assert view.view(same).contiguous
    assert (type(other), other.dtype, tuple(other.shape)) == (type(x), x.dtype, (7,))


def test_copy_into_takes_any_strides() -> None:
    source, target = np.arange(6.0).reshape(2, 3), np.zeros((3, 2)).T
    view.copy_into(target, source)
    np.testing.assert_array_equal(target, source)
    parameter = torch.nn.Parameter(torch.zeros(3, 2).T)
    view.copy_into(parameter, torch.from_numpy(source).float())
    np.testing.assert_array_equal(parameter.detach().numpy(), source)


def test_copy_into_refuses_what_would_broadcast_or_convert() -> None:
    with pytest.raises(ArgumentError, match="shape"):
        view.copy_into(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ArgumentError, match="numpy"):
        view.copy_into(torch.zeros(3), np.zeros(3))
    with pytest.raises(DtypeError, match="float32"):
        view.copy_into(np.zeros(3), np.zeros(3, np.float32))
    with pytest.raises(ArgumentError, match="read-only"):
        view.copy_into(torch.zeros(1).expand(3), torch.zeros(3))


def test_as_numpy_shares_the_memory() -> None:
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    view.as_numpy(view.view(x))[3] = 0x3F80
    assert x[1, 1] == 1
    y = np.zeros((2, 2))
    view.as_numpy(view.view(y))[3] = 5
    assert y[1, 1] == 5
    with pytest.raises(ArgumentError, match="contiguous"):
        view.as_numpy(view.view(y[:, 1]))


def test_extent_covers_gaps_and_negative_strides() -> None:
    x = np.zeros((4, 6), np.int16)
    start = x.ctypes.data
    assert view.extent(view.view(x)) == (start, start + 48)
    assert view.extent(view.view(x[1:3, 2])) == (start + 16, start + 30)
    assert view.extent(view.view(x[::-1, 5])) == (start + 10, start + 48)
    y = torch.zeros(4, 6, dtype=torch.int16)
    assert view.extent(view.view(y[1:3, 2])) == (y.data_ptr() + 16, y.data_ptr() + 30)


def test_marking_memory_as_written_makes_backward_raise() -> None:
    weight = torch.ones(3, requires_grad=True)
    saved = weight * 2
    loss = (saved * saved).sum()
    view.mark_written(view.view(saved))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
