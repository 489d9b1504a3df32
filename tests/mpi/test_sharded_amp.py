"""What torch itself does to gradients of sharded weights: GradScaler, clipping, zeros; equal to a run without shard."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from training_helpers import FEATURES, abandon, assert_alike, batch

import mpidl

WITH_OTHERS = True
ANY_MPI = True
SIZES = (1, 3)


def model_of() -> torch.nn.Sequential:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(FEATURES, 37), torch.nn.Tanh(), torch.nn.Linear(37, 5), torch.nn.Linear(5, 1)]
    return torch.nn.Sequential(*layers)


class Run:
    """One of two runs that must be equal."""

    def __init__(self, comm: mpidl.Communicator, *, shard: bool) -> None:
        self.model = model_of()
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optimizer = mpidl.Synchronous(inner, self.model, comm=comm, shard=shard)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        self.rank = comm.rank

    def loss(self, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x, y = batch(self.rank, step, dtype=torch.float32)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return torch.nn.functional.mse_loss(self.model(x).float(), y)


def both(comm: mpidl.Communicator) -> list[Run]:
    return [Run(comm, shard=shard) for shard in (False, True)]


def close(first: Run, second: Run, bound: float = 1e-6) -> None:
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)


def end(comm: mpidl.Communicator, runs: list[Run]) -> None:
    for run in runs:
        run.optimizer.finish()
        assert_alike(comm, run.model)
        assert all(p.grad is None or type(p.grad) is torch.Tensor for p in run.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clips", [False, True])
def test_gradscaler(comm: mpidl.Communicator, dtype: torch.dtype, clips: bool) -> None:
    runs, norms = both(comm), [list[float](), list[float]()]
    for step in range(6):
        for run, found in zip(runs, norms, strict=True):
            run.optimizer.zero_grad()
            loss = run.loss(step, dtype)
            if step == 2 and comm.rank == comm.size - 1:
                loss = loss * math.inf  # one rank overflows: no rank may step
            run.scaler.scale(loss).backward()
            if clips:
                run.scaler.unscale_(run.optimizer)
                found.append(float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)))
            before = copy.deepcopy(run.model.state_dict())
            run.scaler.step(run.optimizer)
            run.scaler.update()
            stayed = all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
            assert stayed == (step == 2)
        assert runs[0].scaler.get_scale() == runs[1].scaler.get_scale()
        close(*runs)
    assert runs[0].optimizer.statistics.steps == runs[1].optimizer.statistics.steps == 5
    assert norms[0] == pytest.approx(norms[1], rel=1e-5, nan_ok=True)
    if not clips:
        assert all(map(torch.equal, runs[0].model.parameters(), runs[1].model.parameters()))
    end(comm, runs)


def old_loop(parameters: Any) -> None:
    for parameter in parameters:
        parameter.grad.data.div_(3.0)
        parameter.grad *= 2
        parameter.grad.detach().clamp_(-0.01, 0.02)


CLIPPING = {
    "norm": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.05),
    "norm of some": lambda ps: torch.nn.utils.clip_grad_norm_(ps[2:4], 0.02),
    "largest": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.05, norm_type=math.inf),
    "norm 1": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.05, norm_type=1),
    "norm 3": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.05, norm_type=3, error_if_nonfinite=True),
    "foreach": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.05, foreach=True),
    "value": lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.01),
    "value, foreach": lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.01, foreach=True),
    "one by one": lambda ps: [torch.nn.utils.clip_grad_norm_(p, 0.01) for p in ps][-1],
    "total": lambda ps: torch.nn.utils.get_total_norm([p.grad for p in ps]),
    "an old loop": old_loop,
}


@pytest.mark.parametrize("name", CLIPPING)
def test_torchs_own_clipping(comm: mpidl.Communicator, name: str) -> None:
    runs = both(comm)
    for step in range(2):
        found = []
        for run in runs:
            run.optimizer.zero_grad()
            run.loss(step).backward()
            found.append(CLIPPING[name](list(run.model.parameters())))
            found.append(run.optimizer.clip_grad_norm_(1.0))
            run.optimizer.step()
        for ours, theirs in ((found[2], found[0]), (found[3], found[1])):
            assert ours is None or torch.allclose(ours, theirs, rtol=1e-5), (ours, theirs)
        close(*runs)
    end(comm, runs)


def test_gradients_that_become_zeros(comm: mpidl.Communicator) -> None:
    runs = both(comm)
    for step in range(4):
        for run in runs:
            if step != 2:
                run.loss(step).backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=step == 3)
        close(*runs)
    end(comm, runs)


def test_a_rank_that_has_finished_answers(comm: mpidl.Communicator) -> None:
    runs = both(comm)
    for run in runs:
        for step in range(4 if comm.rank == 0 else 2):
            run.optimizer.zero_grad()
            run.scaler.scale(run.loss(step)).backward()
            run.scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            run.scaler.step(run.optimizer)
            run.scaler.update()
        run.optimizer.finish()
    close(*runs)


def test_other_changes_are_refused_by_name(comm: mpidl.Communicator) -> None:
    run = Run(comm, shard=True)
    run.loss(0).backward()
    gradient, noise = run.model[2].weight.grad, torch.ones(5, 37)
    for change in (lambda: gradient.add_(1), lambda: gradient.mul_(noise), lambda: gradient.copy_(noise)):
        with pytest.raises(mpidl.ArgumentError, match=r"gradient of parameter 2\.weight: with shard=True"):
            change()
    with pytest.raises(mpidl.ArgumentError, match=r"parameter 2\.weight: .* norm over all"):
        torch.linalg.vector_norm(gradient, dim=0)
    assert gradient.isnan().all() and "2.weight" in repr(gradient) and type(gradient + 1) is torch.Tensor
    copied = copy.deepcopy(gradient)
    assert type(copied) is torch.Tensor and copied.shape == (5, 37) and copied.isnan().all()
    run.optimizer.step()
    run.optimizer.finish()


def test_a_norm_on_one_rank_alone(comm: mpidl.Communicator) -> None:
    if comm.size == 1:
        return
    run = Run(comm, shard=True)
    run.loss(0).backward()
    with pytest.raises(mpidl.MismatchError, match="the norm of a gradient"):
        if comm.rank == 0:
            run.model[0].weight.grad.norm()
        else:
            run.optimizer.step()
    abandon(run.optimizer)
