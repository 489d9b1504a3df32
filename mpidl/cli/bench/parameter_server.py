"""Commits to the center variable and pulls from it, by 1, 2, ... workers at once, against the plain one-sided calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl.cli.bench import masters, targets
from mpidl.cli.bench.commits import SCALE, Way
from mpidl.cli.bench.harness import Case, Contender, Field
from mpidl.cli.bench.ranks import Together
from mpidl.collectives.communicator import Communicator
from mpidl.mpi import runtime
from mpidl.parameter_server.center.center import Center
from mpidl.parameter_server.center.sharding import shard
from mpidl.parameter_server.downpour import Downpour

REFERENCE, RATE = targets.ONE_SIDED, "updates/s"
_COUNT, _QUICK_COUNT = 25_000_000, 100_000
_PARAMETERS = 25  # of Downpour's model


def fields(ranks: Together, quick: bool) -> Iterator[tuple[Case, AbstractContextManager[Field]]]:
    for case in cases(ranks.size, quick):
        yield case, _contenders(ranks, **case.parameters)


def cases(ranks: int, quick: bool) -> list[Case]:
    count = _QUICK_COUNT if quick else _COUNT
    found = []
    for workers, master in [(n, False) for n in range(1, ranks + 1)] + [(n, True) for n in range(1, ranks)]:
        name = f"{workers} worker{'s' if workers > 1 else ''}{' and a master' if master else ''}"
        parameters = {"workers": workers, "master": master, "count": count}
        found.append(Case(name, parameters, workers, least_repeats=2))
    return found


@contextmanager
def _contenders(ranks: Together, workers: int, master: bool, count: int) -> Iterator[Field]:
    """The first `workers` ranks work, behind one that serves if there is a master; the others sit out."""
    taking_part = workers + master
    part = ranks.raw.Split(0 if ranks.rank < taking_part else runtime.mpi().UNDEFINED, ranks.rank)
    if ranks.rank >= taking_part:
        yield Field(None, ())
        return
    together = Together(Communicator(part))
    with ExitStack() as stack:
        ways = (_server, _one_sided) if master else (_server, _downpour, _one_sided)
        made = [stack.enter_context(way(together, count, 0 if master else 1)) for way in ways]
        made += stack.enter_context(masters.ways(together, count)) if master else []
        yield Field(together, [Contender(way.name, way.run, way.check) for way in made])
    together.free()
    together.comm.free()
    part.Free()


class _Server(Way):
    """What `Center` does for every algorithm."""

    name = targets.SERVER

    def __init__(self, workers: Together, count: int, first: int) -> None:
        super().__init__(workers, count, first)
        self._pulled: NDArray[np.float32] = np.zeros_like(self._moved)
        self.server = Center(workers.comm.topology, np.zeros(count, np.float32), "mpidl bench")

    def exchange(self) -> None:
        self.server.commit_and_pull(self._moved, self._pulled, scale=SCALE)

    def center(self) -> NDArray[np.float32]:
        self.server.pull(self._pulled)
        return self._pulled


class _OneSided(Way):
    """The plain calls on a window that is cut in the same shards."""

    name = targets.ONE_SIDED

    def __init__(self, workers: Together, count: int, first: int) -> None:
        super().__init__(workers, count, first)
        self._mpi = runtime.mpi()
        self._delta = np.empty_like(self._moved)
        self._pulled: NDArray[np.float32] = np.zeros_like(self._moved)
        shards = shard(count, workers.size)
        self._order = shards[workers.rank :] + shards[: workers.rank]
        own = shards[workers.rank]
        info = self._mpi.Info.Create({"accumulate_ops": "same_op_no_op"})
        self.window = self._mpi.Win.Allocate(max(1, own.count) * 4, 4, info, workers.raw)
        info.Free()
        np.frombuffer(self.window.tomemory(), np.float32)[:] = 0
        self.window.Lock_all(self._mpi.MODE_NOCHECK)
        self.window.Sync()
        workers.barrier()

    def exchange(self) -> None:
        np.multiply(self._moved, np.float32(SCALE), out=self._delta)
        for part in self._order:
            piece = [self._delta[part.start : part.start + part.count], self._mpi.FLOAT]
            self.window.Accumulate(piece, part.owner, (0, part.count, self._mpi.FLOAT), self._mpi.SUM)
        self.window.Flush_all()
        self._pull()

    def _pull(self) -> None:
        for part in self._order:
            piece = [self._pulled[part.start : part.start + part.count], self._mpi.FLOAT]
            self.window.Get(piece, part.owner, (0, part.count, self._mpi.FLOAT))
        self.window.Flush_all()

    def center(self) -> NDArray[np.float32]:
        self._pull()
        return self._pulled


class _Downpour(Way):
    """The whole exchange of an optimiser: a local SGD step, packing, commit, pull, unpacking."""

    name = targets.DOWNPOUR

    def __init__(self, workers: Together, count: int, first: int) -> None:
        super().__init__(workers, count, first)
        model = nn.Module()
        model.weights = nn.ParameterList(nn.Parameter(torch.zeros(count // _PARAMETERS)) for _ in range(_PARAMETERS))
        for number, weight in enumerate(model.weights):
            piece = self._pattern[number * weight.numel() : (number + 1) * weight.numel()]
            weight.grad = torch.from_numpy(piece * -(workers.rank + 1.0)).float()  # the step adds the pattern
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        self.optimizer = Downpour(inner, model, communication_window=1, comm=workers.comm)

    def exchange(self) -> None:
        self.optimizer.step()

    def center(self) -> NDArray[np.float32]:
        return np.concatenate([weight.numpy() for weight in self.optimizer.center()[1].values()])


@contextmanager
def _server(workers: Together, count: int, first: int) -> Iterator[Way]:
    way = _Server(workers, count, first)
    yield way
    way.server.close()


@contextmanager
def _downpour(workers: Together, count: int, first: int) -> Iterator[Way]:
    way = _Downpour(workers, count, first)
    yield way
    way.optimizer.finish()


@contextmanager
def _one_sided(workers: Together, count: int, first: int) -> Iterator[Way]:
    way = _OneSided(workers, count, first)
    yield way
    way.window.Flush_all()
    way.window.Unlock_all()
    workers.barrier()  # as in mpidl's own windows: without it MPICH may hang
    way.window.Free()
