"""Histories of commits and pulls, and what a center that does one after the other would make of them. No MPI here.

Commit number i of a test adds 4^(i mod 26) to the elements of its group (i div 26), so that each element of a pull says
which commits are in it, and how often: a digit of 2 is a commit that came twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

PER_ELEMENT = 26  # digits of base 4 that float64 holds exactly


@dataclass(frozen=True)
class Commit:
    """One commit: `name` is 0, 1, ... over all workers, `number` what the server gave it; times are comparable."""

    worker: int
    name: int
    number: int
    began: float
    ended: float


@dataclass(frozen=True)
class Pull:
    """One pull: the `clock` that came with it, and the center."""

    worker: int
    clock: int
    center: np.ndarray[Any, Any]
    began: float
    ended: float


@dataclass(frozen=True)
class Shape:
    """Of a test: how many commits there are in all, and where each element lies."""

    commits: int
    elements: int
    shards: tuple[tuple[int, int], ...]  # start and stop

    @property
    def groups(self) -> int:
        return -(-self.commits // PER_ELEMENT)

    def delta(self, name: int) -> np.ndarray[Any, Any]:
        """Returns what the commit of this name adds."""
        mine = np.arange(self.elements) % self.groups == name // PER_ELEMENT
        return np.where(mine, 4.0 ** (name % PER_ELEMENT), 0.0)

    def seen(self, pull: Pull) -> np.ndarray[Any, Any]:
        """Returns how often each element holds each of its group's commits, shape (elements, 26)."""
        whole = pull.center.astype(np.int64)
        assert np.array_equal(whole, pull.center)
        return (whole[:, None] >> (2 * np.arange(PER_ELEMENT))) & 3

    def elements_of(self, name: int) -> np.ndarray[Any, Any]:
        """Returns the places of the elements to which this commit adds."""
        return np.arange(name // PER_ELEMENT, self.elements, self.groups)


def complaints(shape: Shape, commits: list[Commit], pulls: list[Pull], *, whole_shards: bool) -> Iterator[str]:
    """Yields what no center could have done that adds each commit once, element by element.

    Args:
        shape: of the test.
        commits: all of them.
        pulls: all of them, each worker's in their order.
        whole_shards: a shard changes as one.
    """
    seen = [shape.seen(pull) for pull in pulls]
    yield from _numbers(shape, commits)
    for pull, digits in zip(pulls, seen, strict=True):
        yield from _one_pull(shape, commits, pull, digits)
    for start, stop in shape.shards:
        yield from _one_shard(shape, np.stack([digits[start:stop] for digits in seen]), start, whole=whole_shards)
    for worker in sorted({pull.worker for pull in pulls}):
        own = [digits for pull, digits in zip(pulls, seen, strict=True) if pull.worker == worker]
        if any((later < earlier).any() for earlier, later in itertools.pairwise(own)):
            yield f"worker {worker} no longer sees what it has seen"


def _numbers(shape: Shape, commits: list[Commit]) -> Iterator[str]:
    if sorted(commit.number for commit in commits) != list(range(shape.commits)):
        yield "numbers of commits are not 0, 1, ..., each once"
    for one in commits:
        for other in commits:
            if one.ended < other.began and one.number > other.number:
                yield f"commit {other.name} began after commit {one.name} had ended, and has a smaller number"


def _one_pull(shape: Shape, commits: list[Commit], pull: Pull, digits: np.ndarray[Any, Any]) -> Iterator[str]:
    if digits.max(initial=0) > 1:
        yield f"a pull of worker {pull.worker} holds a commit more than once"
    whole = 0
    for commit in commits:
        there = digits[shape.elements_of(commit.name), commit.name % PER_ELEMENT] > 0
        whole += bool(there.all())
        if commit.ended < pull.began and not there.all():
            yield f"commit {commit.name} had ended before a pull of worker {pull.worker} that does not hold all of it"
        if commit.began > pull.ended and there.any():
            yield f"commit {commit.name} began after a pull of worker {pull.worker} had ended that holds some of it"
    if whole < pull.clock:
        yield f"a pull of worker {pull.worker} counts {pull.clock} commits, and {whole} are in it as a whole"


def _one_shard(shape: Shape, states: np.ndarray[Any, Any], start: int, *, whole: bool) -> Iterator[str]:
    """An element, or a shard, goes from one state to the next: of two pulls, one holds all that the other does.

    Args:
        states: of the shard in each pull, shape (pulls, elements, 26).
    """
    places = np.arange(start, start + states.shape[1]) % shape.groups
    alike = [states[:, places == group] for group in range(shape.groups)]
    if whole and any((group != group[:, :1]).any() for group in alike):
        yield f"a pull holds a commit in a part of the shard from {start} only"
    counted = states.sum(axis=(1, 2) if whole else 2, keepdims=True)
    ordered = np.take_along_axis(states, np.argsort(counted, axis=0, kind="stable"), axis=0)
    if (ordered[1:] < ordered[:-1]).any():
        yield f"two pulls of the shard from {start} hold what cannot have come one after the other"
