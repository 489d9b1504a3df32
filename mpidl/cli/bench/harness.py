"""Contenders take turns, A B A B, and every result is checked in the same run: a wrong one has no figure."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl.cli.bench.ranks import Ranks


@dataclass(frozen=True)
class Plan:
    """How long is measured."""

    warm_ups: int = 6  # MPICH changes its algorithm after five calls
    rounds: int = 21
    turn: float = 0.004  # seconds that a turn should last at least; short operations are repeated within it
    most_repeats: int = 500


QUICK = Plan(warm_ups=2, rounds=3, turn=0.001, most_repeats=20)


@dataclass(frozen=True)
class Case:
    """What all contenders do in these rounds; alike on all ranks."""

    name: str
    parameters: dict[str, Any]
    amount: float  # what one operation of all ranks gets done, in the unit of the benchmark's RATE
    least_repeats: int = 1  # operations in a turn, at least


@dataclass(frozen=True)
class Contender:
    """One way to do it.

    `run` does it once. `check` does it once more on data of its own, which differ by rank, and returns what is wrong
    with the result, or nothing; it is called before the first round and after the last.
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], str]


@dataclass(frozen=True)
class Field:
    """Who competes in a case, and on which ranks."""

    ranks: Ranks | None  # None: this rank sits out
    contenders: Sequence[Contender]


@dataclass(frozen=True)
class Series:
    """What came of one contender in one case: seconds for one operation, by round, of the slowest rank."""

    case: str
    parameters: dict[str, Any]
    amount: float
    contender: str
    seconds: list[float]  # empty where the result was wrong
    repeats: int
    complaint: str  # what was wrong


def measure(case: Case, contenders: Sequence[Contender], ranks: Ranks, plan: Plan) -> list[Series]:
    """Measures the contenders of one case; a collective.

    Returns:
        One series for each contender, the same on every rank.
    """
    complaints = {one.name: _agreed(one, ranks) for one in contenders}
    sound = [one for one in contenders if not complaints[one.name]]
    with _without_collector():
        repeats = _warm_up(sound, ranks, plan, case.least_repeats)
        mine = _rounds(sound, ranks, plan.rounds, repeats)
    slowest = np.max(np.array(ranks.everywhere(mine), float), axis=0) if sound else np.empty((0, 0))
    seconds = {one.name: row.tolist() for one, row in zip(sound, slowest, strict=True)}
    for one in sound:
        complaints[one.name] = _agreed(one, ranks)
    return [
        Series(
            case.name,
            case.parameters,
            case.amount,
            one.name,
            [] if complaints[one.name] else seconds[one.name],
            repeats.get(one.name, 0),
            complaints[one.name],
        )
        for one in contenders
    ]


def _agreed(contender: Contender, ranks: Ranks) -> str:
    """Returns what is wrong with the contender's result on any rank."""
    found = ranks.everywhere(contender.check())
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "")


def _warm_up(contenders: Sequence[Contender], ranks: Ranks, plan: Plan, least: int) -> dict[str, int]:
    """Runs everybody a few times; returns how often each is repeated within a turn, alike on all ranks."""
    once = dict.fromkeys((one.name for one in contenders), 1)
    times = _rounds(contenders, ranks, plan.warm_ups, once)
    own = [float(np.median(row)) for row in times]
    slowest = [max(row) for row in zip(*ranks.everywhere(own), strict=True)]
    wanted = [math.ceil(plan.turn / max(seconds, 1e-9)) for seconds in slowest]
    return {one.name: min(plan.most_repeats, max(least, count)) for one, count in zip(contenders, wanted, strict=True)}


def _rounds(contenders: Sequence[Contender], ranks: Ranks, rounds: int, repeats: dict[str, int]) -> list[list[float]]:
    """Returns this rank's seconds for one operation, by contender and round.

    Who begins a round changes from round to round, so that nobody always follows the same one and its caches.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds):
        for turn in range(len(contenders)):
            index = (number + turn) % len(contenders)
            contender = contenders[index]
            run, count = contender.run, repeats[contender.name]
            ranks.barrier()
            started = time.perf_counter()
            for _ in range(count):
                run()
            times[index].append((time.perf_counter() - started) / count)
    return times


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector of cycles must not fall into somebody's turn."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
