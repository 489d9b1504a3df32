"""Sums of float32 over all ranks: Communicator.allreduce against MPI_Allreduce, gloo and a memcpy of the same size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mpidl.cli.bench import gloo, targets
from mpidl.cli.bench.between_nodes import BetweenNodes, between_nodes
from mpidl.cli.bench.harness import Case, Contender, Field
from mpidl.cli.bench.ranks import Together
from mpidl.cli.bench.targets import KIB, MIB, size_text
from mpidl.mpi import runtime

REFERENCE, RATE = targets.MPI, "GB/s"
SIZES = tuple(kib * KIB for kib in (4, 16, 64, 256)) + tuple(mib * MIB for mib in (1, 4, 16, 32, 64, 256))
_LARGEST_BETWEEN_NODES = 16 * MIB  # slow links show no more with larger ones
_QUICK_SIZES = (4 * KIB, 64 * KIB, MIB)
_PIECE = 1 << 20  # elements compared at a time: nothing as large as the arrays is made for a check


def fields(ranks: Together, quick: bool) -> Iterator[tuple[Case, AbstractContextManager[Field]]]:
    with gloo.process_group(ranks), between_nodes(ranks) as apart:
        for case in cases(ranks.size, quick, ranks.comm.nodes):
            if apart is not None:
                case.parameters["chosen"] = apart.chosen(case.parameters["nbytes"])
            yield case, nullcontext(Field(ranks, _Arrays(ranks, case).contenders(apart)))


def cases(ranks: int, quick: bool, nodes: int = 1) -> list[Case]:
    return [
        Case(f"{size_text(nbytes)}, {place}", {"nbytes": nbytes, "place": place, "nodes": nodes}, nbytes / 1e9)
        for nbytes in (_QUICK_SIZES if quick else SIZES)
        if nodes == 1 or nbytes <= _LARGEST_BETWEEN_NODES
        for place in ("out of place", "in place")
    ]


class _Arrays:
    """One rank's arrays for one case.

    Sums in place grow from call to call, at last to infinities; these cost an addition no more time than numbers do.
    Checks begin with new data: whole numbers that differ by rank and by place and add up exactly.
    """

    def __init__(self, ranks: Together, case: Case) -> None:
        self._ranks, self._in_place = ranks, case.parameters["place"] == "in place"
        count = case.parameters["nbytes"] // 4
        self._pattern = np.resize(np.arange(1, 14, dtype=np.float32), count)
        self._x = self._pattern * (ranks.rank + 1)
        self._y = np.zeros(count, np.float32)

    def contenders(self, apart: BetweenNodes | None) -> list[Contender]:
        out = self._x if self._in_place else self._y
        comm, raw, mpi = self._ranks.comm, self._ranks.raw, runtime.mpi()
        send = mpi.IN_PLACE if self._in_place else [self._x, self._x.size, mpi.FLOAT]
        receive = [out, out.size, mpi.FLOAT]
        made = [
            self._contender(targets.OURS, lambda: comm.allreduce(self._x, out=out), out),
            self._contender(targets.MPI, lambda: raw.Allreduce(send, receive, mpi.SUM), out),
            Contender(targets.MEMCPY, lambda: np.copyto(self._y, self._x), self._check_memcpy),
        ]
        if not self._in_place:
            made.insert(0, self._contender(targets.FRESH, lambda: comm.allreduce(self._x), None))
            if apart is not None:
                made += [self._contender(name, run, out) for name, run in apart.calls(self._x, out).items()]
                made.append(self._exchange(apart, out))
        elif gloo.available():  # which knows sums in place only
            tensor = torch.from_numpy(self._x)
            made.append(self._contender(targets.GLOO, lambda: dist.all_reduce(tensor), out))
        return made

    def _exchange(self, apart: BetweenNodes, out: Any) -> Contender:
        run, peer = apart.exchange(self._x, out)

        def check() -> str:
            np.multiply(self._pattern, self._ranks.rank + 1, out=self._x)
            out[:] = 0
            run()
            return "" if peer is None else self._compare(out, peer + 1)

        return Contender(targets.EXCHANGE, run, check)

    def _contender(self, name: str, run: Callable[[], Any], result: Any) -> Contender:
        return Contender(name, run, lambda: self._check(run, result))

    def _check(self, run: Callable[[], Any], result: Any) -> str:
        np.multiply(self._pattern, self._ranks.rank + 1, out=self._x)
        self._y[:] = 0
        returned = run()
        found = returned if result is None else result
        return self._compare(found, self._ranks.size * (self._ranks.size + 1) / 2)

    def _check_memcpy(self) -> str:
        np.multiply(self._pattern, self._ranks.rank + 1, out=self._x)
        np.copyto(self._y, self._x)
        return self._compare(self._y, self._ranks.rank + 1)

    def _compare(self, found: Any, factor: float) -> str:
        for at in range(0, found.size, _PIECE):
            expected = self._pattern[at : at + _PIECE] * np.float32(factor)
            wrong = np.flatnonzero(found[at : at + _PIECE] != expected)
            if wrong.size:
                first = at + int(wrong[0])
                return f"element {first} is {found[first]}; expected {expected[wrong[0]]}"
        return ""
