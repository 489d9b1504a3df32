"""What a forked child of a rank may not do, which shares the node's memory; and constructors that fail."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from family_helpers import KINDS
from training_helpers import batch, loss_of, mlp

import mpidl
from mpidl.mpi import exit_protocol

WITH_OTHERS = True
ANY_MPI = True
SIZES = (2,)
MAKES = {name: kind for name, kind in KINDS.items() if name != "EAMSGD"} | {
    "Synchronous": mpidl.Synchronous,
    "sharded": lambda *args, **more: mpidl.Synchronous(*args, shard=True, **more),
    "ModelAveraging": mpidl.ModelAveraging,
    "DiLoCo": mpidl.DiLoCo,
}


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def refused(calls: dict[str, Callable[[], object]]) -> list[str]:
    """Makes each call in a forked child; returns the names of those that the child was not refused."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        wrong = []
        for name, call in calls.items():
            try:
                call()
            except mpidl.ForkedError:
                continue
            except BaseException as error:
                name += f": {type(error).__name__}: {error}"  # noqa: PLW2901
            wrong.append(name)
        os.write(write, "\n".join(wrong).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        found = stream.read().split("\n")
    assert os.waitpid(child, 0)[1] == 0
    return [name for name in found if name]


@pytest.mark.parametrize("name", MAKES)
def test_every_entry_refuses_a_forked_child(comm: mpidl.Communicator, name: str) -> None:
    model = mlp()
    optimizer = MAKES[name](sgd(model), model, comm=comm)
    loss_of(model, batch(comm.rank, 0)).backward()

    def leave() -> None:
        with optimizer:
            pass

    def enter() -> None:
        with mpidl.exclusive(model):
            pass

    calls: dict[str, Callable[[], object]] = {"step": optimizer.step, "finish": optimizer.finish, "with": leave}
    calls["constructor"] = lambda: MAKES[name](sgd(model), model, comm=comm)
    if name in KINDS:
        calls |= {"center": optimizer.center, "snapshot": optimizer.snapshot, "sums": optimizer.sums}
    if name in ("Synchronous", "sharded"):
        calls["backward"] = lambda: loss_of(model, batch(comm.rank, 1)).backward()
    if name == "sharded":
        calls |= {"clip": lambda: optimizer.clip_grad_norm_(1.0), "full": optimizer.full_state_dict, "exclusive": enter}
    assert not refused(calls)
    optimizer.step()
    optimizer.finish()


def test_collectives_refuse_a_forked_child(comm: mpidl.Communicator) -> None:
    x = np.ones(comm.size)
    started = comm.iallreduce(x)
    calls: dict[str, Callable[[], object]] = {"test": started.test, "wait": started.wait, "barrier": comm.barrier}
    for kind in ("allreduce", "iallreduce", "reduce", "reduce_scatter", "broadcast", "allgather", "alltoall"):
        calls[kind] = lambda kind=kind: getattr(comm, kind)(x)
    calls |= {"out": lambda: comm.allreduce(x, out=x), "world": mpidl.world}
    calls["new"] = lambda: mpidl.Communicator(comm.topology.data)
    assert not refused(calls)
    assert (started.wait() == comm.size).all()
    own = mpidl.Communicator(comm.topology.data)
    assert not refused({"free": own.free})
    own.free()


@pytest.mark.parametrize("name", KINDS)
def test_a_constructor_that_fails_leaves_nothing_open(
    comm: mpidl.Communicator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, model = dict(exit_protocol._open), mlp()
    momentum = 0.9 if name == "EAMSGD" else 0.0
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    monkeypatch.setenv("MPIDL_CENTER", "post")
    with pytest.raises(mpidl.ArgumentError, match="MPIDL_CENTER"):
        KINDS[name](inner, model, comm=comm)
    assert exit_protocol._open == before
    monkeypatch.delenv("MPIDL_CENTER")
    KINDS[name](inner, model, comm=comm).finish()
    assert exit_protocol._open == before
