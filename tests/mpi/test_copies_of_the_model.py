"""Copies, pickles and compiled forms of a model while an optimiser is around it: nothing of mpidl travels with them."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import pickletools
import subprocess
import sys
from typing import Any

import pytest
import torch
from family_helpers import KINDS
from training_helpers import FEATURES, abandon, assert_alike, batch, loss_of

import mpidl
from mpidl.optim.module_calls import ModuleCalls

WITH_OTHERS = True
ANY_MPI = True
SIZES = (2,)
MAKES = KINDS | {
    "warm DistBelief": lambda *args, **more: mpidl.DistBelief(*args, warm_start=2, **more),
    "Synchronous": mpidl.Synchronous,
    "sharded": lambda *args, **more: mpidl.Synchronous(*args, shard=True, **more),
    "ModelAveraging": mpidl.ModelAveraging,
    "DiLoCo": mpidl.DiLoCo,
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(FEATURES, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.last = torch.nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class WithState(Net):
    """With a state of its own, which copies all attributes."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


def made(comm: mpidl.Communicator, name: str, model: torch.nn.Module) -> Any:
    return MAKES[name](torch.optim.SGD(model.parameters(), lr=0.01), model, comm=comm)


def data(rank: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return batch(rank, step, dtype=torch.float32)


def saved(what: object) -> bytes:
    stream = io.BytesIO()
    torch.save(what, stream)
    return stream.getvalue()


def names_in(pickled: bytes) -> list[str]:
    return [str(value) for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)]


@pytest.mark.parametrize("kind", [Net, WithState])
@pytest.mark.parametrize("name", MAKES)
def test_nothing_of_mpidl_travels(comm: mpidl.Communicator, name: str, kind: type[Net]) -> None:
    model = kind()
    optimizer = made(comm, name, model)
    model.eval()
    x = data(comm.rank)[0]
    with torch.no_grad():
        expected = model(x)
    assert not [text for text in names_in(pickle.dumps(model)) if "mpidl" in text]
    stream = io.BytesIO(saved(model))
    if comm.rank == 1:  # on one rank alone: a copy takes part in nothing
        copies = [copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))]
        copies += [torch.load(stream, weights_only=False), torch.optim.swa_utils.AveragedModel(model)]
        copies += [torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)]
        if name == "Synchronous":  # the first use of torch.export in a process takes seconds
            copies.append(torch.export.export(model, (x,)).module())
        copies.append(model._replicate_for_data_parallel())
        for number, copied in enumerate(copies):
            assert torch.equal(copied(x), expected), number
        with torch.no_grad():
            for parameter in copies[0].parameters():
                parameter.zero_()
        assert not copies[0](x).any()  # a copy calls itself
        copies[0](x).sum().backward()
    finish(optimizer, model, comm)


def finish(optimizer: Any, model: torch.nn.Module, comm: mpidl.Communicator) -> None:
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, data(comm.rank, step)).backward()
        optimizer.step()
    optimizer.finish()
    assert "_compiled_call_impl" not in model.__dict__
    assert_alike(comm, model)


@pytest.mark.parametrize("shard", [False, True])
def test_what_is_saved_is_as_large_as_the_tensor(comm: mpidl.Communicator, shard: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 4), torch.nn.Linear(4, 1), torch.nn.Linear(1, 3000))
    optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.01), model, comm=comm, shard=shard)
    model(data(comm.rank)[0]).sum().backward()
    for parameter in model.parameters():
        for tensor in (parameter, parameter.detach(), parameter.grad):
            assert tensor.untyped_storage().nbytes() <= tensor.numel() * 4
            assert len(saved(tensor)) < 3000 + 4 * tensor.numel()
    state = torch.load(io.BytesIO(saved(model.state_dict())))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    kept = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in kept]
    optimizer.step()
    optimizer.zero_grad()
    model(data(comm.rank, 1)[0]).sum().backward()  # goes elsewhere
    if not shard:
        assert all(map(torch.equal, kept, values))
    optimizer.finish()


ELSEWHERE = """
import sys
sys.modules["mpidl"] = None
import torch
with torch.serialization.safe_globals([torch.nn.Sequential, torch.nn.Linear]):
    model = torch.load(sys.argv[1])
print(float(model(torch.ones(2, 4)).sum()))
"""


def test_a_saved_model_loads_where_there_is_no_mpidl(comm: mpidl.Communicator, tmp_path: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 1))
    with made(comm, "Synchronous", model):
        file = tmp_path / f"model{comm.rank}"
        torch.save(model, file)
        if comm.rank == 0:
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "PMIX", "HYD"))}
            command = [sys.executable, "-c", ELSEWHERE, str(file)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            assert float(printed) == pytest.approx(float(model(torch.ones(2, 4)).sum()), rel=1e-6)


@pytest.mark.parametrize("how", ["after", "compile before", "compile after"])
def test_a_compiled_model_trains_as_the_model_does(comm: mpidl.Communicator, how: str) -> None:
    models = [Net(), Net()]
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    forward = models[0]
    if how == "compile before":
        models[0].compile(**options)
    optimizers = [made(comm, "Synchronous", model) for model in models]
    if how == "after":
        forward = torch.compile(models[0], **options)
    elif how == "compile after":
        models[0].compile(**options)
    for step in range(3):
        for call, optimizer in zip((forward, models[1]), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(call, data(comm.rank, step)).backward()
            optimizer.step()
    for optimizer in optimizers:
        optimizer.finish()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(*(m.parameters() for m in models), strict=True))
    assert_alike(comm, models[0])
    assert ("_compiled_call_impl" in models[0].__dict__) == how.startswith("compile")


def test_calls_around_calls() -> None:
    """Two optimisers around one model, `Module.compile` between them, and the first one leaves first."""
    model, told = Net(), list[str]()
    x = data(0)[0]
    first = ModuleCalls(model, before=lambda: told.append("first"))
    second = ModuleCalls(model, before=lambda: told.append("second"), after=lambda _: told.append("after"))
    model(x)
    assert told == ["second", "first", "after"]
    first.remove()
    model(x)
    assert told[3:] == ["second", "after"]
    model.__dict__["_compiled_call_impl"] = model._call_impl  # as `Module.compile` does
    model(x)
    assert len(told) == 5
    second.watch()
    second.watch()
    model(x)
    assert told[5:] == ["second", "after"]
    second.remove()
    model(x)
    assert len(told) == 7 and model.__dict__["_compiled_call_impl"] == model._call_impl


def test_no_call_keeps_an_optimizer_alive(comm: mpidl.Communicator) -> None:
    model = Net()
    optimizer = made(comm, "sharded", model)
    optimizer._ranks.barrier("test")
    abandon(optimizer)
    weights = optimizer._sharded.weights
    del optimizer
    gc.collect()
    assert weights.released
