"""Parameters and optimisers that `shard=True` refuses, checked without MPI."""

from __future__ import annotations

import pytest
import torch

import mpidl
from mpidl.synchronous.sharded import state


def test_parameters_on_a_device_are_refused_by_name() -> None:
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(mpidl.DtypeError, match=r"parameter far\.weight is on meta: shard=True keeps weights in memory"):
        state.refuse(torch.optim.SGD([parameter], lr=0.1), [("far.weight", parameter)])


def test_a_class_derived_from_a_known_one_is_refused() -> None:
    """A derived class may override its step."""

    class Mine(torch.optim.SGD):
        pass

    parameter = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(mpidl.ArgumentError, match="shard=True cannot be used with Mine: it is not known to treat"):
        state.refuse(Mine([parameter], lr=0.1), [("weight", parameter)])


def test_state_of_another_shape_is_refused_by_name() -> None:
    parameter = torch.nn.Parameter(torch.empty(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros(2)
    with pytest.raises(
        mpidl.ArgumentError, match=r"'momentum_buffer' of parameter weight has shape \(2,\); expected \(3,\)"
    ):
        state.refuse(optimizer, [("weight", parameter)])
