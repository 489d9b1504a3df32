"""Whole training steps of two models: mpidl.Synchronous, torch DDP over gloo, and trainers that do not communicate.

Beside them what a step does after backward alone, with shards and without (`updates`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mpidl.cli.bench import gloo, models, targets, updates
from mpidl.cli.bench.harness import Case, Contender, Field
from mpidl.cli.bench.models import Work
from mpidl.cli.bench.ranks import Together
from mpidl.synchronous.synchronous import Synchronous

REFERENCE, RATE = targets.INDEPENDENT, "samples/s"
_TOLERANCE = 1e-4  # of a gradient's largest element: float32 sums in another order


def fields(ranks: Together, quick: bool) -> Iterator[tuple[Case, AbstractContextManager[Field]]]:
    with gloo.process_group(ranks):
        for case in cases(ranks.size, quick):
            yield case, _trainers(ranks, models.WORK[case.parameters["model"]])


def cases(ranks: int, quick: bool) -> list[Case]:
    return [
        Case(f"{name}, batch {work.batch}", {"model": name, "batch": work.batch}, ranks * work.batch)
        for name, work in models.WORK.items()
        if name == "mlp" or not quick
    ]


@contextmanager
def _trainers(ranks: Together, work: Work) -> Iterator[Field]:
    made = [_independent, _synchronous, _sharded]
    made += [_ddp] if gloo.available() else []
    made += [_horovod] if importlib.util.find_spec("horovod") is not None else []
    with ExitStack() as stack:
        trainers = [stack.enter_context(make(ranks, work)).contender() for make in made]
        yield Field(ranks, [*trainers, *stack.enter_context(updates.contenders(ranks, work))])


class _Trainer:
    """One way to train: a model of its own, its optimiser, and the batch that all ways of this rank share.

    Args:
        name: of the contender.
        model: holds the parameters.
        forward: computes the output from a batch; the model or what wraps it.
        optimizer: takes the step.
        settle: called after backward and before gradients are looked at; for ways that communicate later.
        alone: gradients are this rank's own.
        gradients: looks at all of them, flat; None for `p.grad` of every parameter.
    """

    def __init__(
        self,
        ranks: Together,
        work: Work,
        name: str,
        model: nn.Module,
        *,
        forward: Callable[[torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        settle: Callable[[], object] = lambda: None,
        alone: bool = False,
        gradients: Callable[[], np.ndarray[Any, Any]] | None = None,
    ) -> None:
        self._gradients = gradients or (lambda: np.concatenate([_gradient(p).ravel() for p in model.parameters()]))
        self._ranks, self._work, self._name, self._alone = ranks, work, name, alone
        self._model, self._forward, self._optimizer, self._settle = model, forward, optimizer, settle
        generator = torch.Generator().manual_seed(ranks.rank)
        self._x = torch.randn((work.batch, *work.inputs), generator=generator)
        self._y = torch.randint(work.classes, (work.batch,), generator=generator)

    def contender(self) -> Contender:
        return Contender(self._name, self._step, self._check)

    def _step(self) -> None:
        self._optimizer.zero_grad()
        self._backward(self._forward)
        self._optimizer.step()

    def _backward(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        loss = nn.functional.cross_entropy(forward(self._x), self._y)
        loss.backward()  # type: ignore[no-untyped-call]

    def _check(self) -> str:
        """Compares the gradients of one step with the mean over ranks of what a plain copy of the model computes."""
        twin = self._work.make()
        twin.load_state_dict(self._model.state_dict())
        self._backward(twin)
        own = np.concatenate([_gradient(p).ravel() for p in twin.parameters()]).astype(np.float64)
        total = own.copy()
        if not self._alone:
            self._ranks.raw.Allreduce(own, total)
            total /= self._ranks.size
        self._optimizer.zero_grad()
        self._backward(self._forward)
        self._settle()
        found = self._gradients()
        error = float(np.abs(found - total).max() / np.abs(total).max())
        if not error <= _TOLERANCE:  # also when it is not a number
            return f"gradients are wrong by {error:.1e} of the largest"
        return "" if self._alone else self._differences()

    def _differences(self) -> str:
        """Returns whether the ranks' parameters have gone apart; a collective."""
        digest = hashlib.sha256()
        for parameter in self._model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        alike = len(set(self._ranks.everywhere(digest.hexdigest()))) == 1
        return "" if alike else "the ranks' parameters differ"


def _gradient(parameter: nn.Parameter) -> np.ndarray[Any, Any]:
    assert parameter.grad is not None
    found: np.ndarray[Any, Any] = parameter.grad.numpy()
    return found


def _new(work: Work) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = work.make()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


@contextmanager
def _independent(ranks: Together, work: Work) -> Iterator[_Trainer]:
    model, optimizer = _new(work)
    yield _Trainer(ranks, work, targets.INDEPENDENT, model, forward=model, optimizer=optimizer, alone=True)


@contextmanager
def _synchronous(ranks: Together, work: Work) -> Iterator[_Trainer]:
    model, inner = _new(work)
    optimizer = Synchronous(inner, model, comm=ranks.comm)
    yield _Trainer(ranks, work, targets.SYNCHRONOUS, model, forward=model, optimizer=optimizer)
    optimizer.finish()


@contextmanager
def _sharded(ranks: Together, work: Work) -> Iterator[_Trainer]:
    model, inner = _new(work)
    optimizer = Synchronous(inner, model, comm=ranks.comm, shard=True)
    trainer = _Trainer(
        ranks,
        work,
        targets.SHARDED,
        model,
        forward=model,
        optimizer=optimizer,
        gradients=lambda: updates.gathered(ranks, optimizer),
    )
    yield trainer
    optimizer.finish()


@contextmanager
def _ddp(ranks: Together, work: Work) -> Iterator[_Trainer]:
    """With the settings that cost it least: gradients live in its buckets, buffers stay local as with mpidl."""
    model, optimizer = _new(work)
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    settings: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    wrapped = nn.parallel.DistributedDataParallel(model, **settings)
    yield _Trainer(ranks, work, targets.DDP, model, forward=wrapped, optimizer=optimizer)


@contextmanager
def _horovod(ranks: Together, work: Work) -> Iterator[_Trainer]:
    import horovod.torch as hvd

    hvd.init()
    model, inner = _new(work)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters())
    yield _Trainer(
        ranks, work, targets.HOROVOD, model, forward=model, optimizer=optimizer, settle=optimizer.synchronize
    )
