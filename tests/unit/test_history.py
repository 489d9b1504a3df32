"""The checker of histories finds each way in which a server can be wrong, and nothing in a right one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))
from history import Commit, Pull, Shape, complaints

WORKERS, EACH = 3, 10
SHAPE = Shape(WORKERS * EACH, 40, ((0, 20), (20, 40)))
History = tuple[list[Commit], list[Pull]]


def right() -> History:
    """Workers in turns, each commit followed by a pull."""
    center, commits, pulls = np.zeros(SHAPE.elements), list[Commit](), list[Pull]()
    for number in range(SHAPE.commits):
        worker, at = number % WORKERS, 10.0 * number
        name = worker * EACH + number // WORKERS
        center = center + SHAPE.delta(name)
        commits.append(Commit(worker, name, number, at, at + 1))
        pulls.append(Pull(worker, number + 1, center, at + 2, at + 3))
    return commits, pulls


def changed(index: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[History], History]:
    """Makes one pull hold something else."""

    def apply(history: History) -> History:
        commits, pulls = history
        pulls[index] = replace(pulls[index], center=change(pulls[index].center.copy()))
        return commits, pulls

    return apply


def twice(center: np.ndarray) -> np.ndarray:
    return center + SHAPE.delta(0)


def lost(center: np.ndarray) -> np.ndarray:
    return center - SHAPE.delta(0)


def torn(center: np.ndarray) -> np.ndarray:
    center[4] -= SHAPE.delta(20)[4]
    return center


def from_the_future(center: np.ndarray) -> np.ndarray:
    return center + SHAPE.delta(29)


def same_number(history: History) -> History:
    commits, pulls = history
    commits[4] = replace(commits[4], number=3)
    return commits, pulls


def numbers_against_time(history: History) -> History:
    commits, pulls = history
    commits[4], commits[9] = replace(commits[4], number=9), replace(commits[9], number=4)
    return commits, pulls


def clock_ahead(history: History) -> History:
    commits, pulls = history
    pulls[5] = replace(pulls[5], clock=7)
    return commits, pulls


def in_two_orders(history: History) -> History:
    """Two commits and two pulls at the same time, each pull with another of the two commits."""
    commits, pulls = history
    before, pair = pulls[26].center, commits[27:29]
    commits[27:29] = [replace(commit, began=270.0, ended=285.0) for commit in pair]
    for index, commit in zip((27, 28), pair, strict=True):
        center = before + SHAPE.delta(commit.name)
        pulls[index] = replace(pulls[index], center=center, clock=28, began=270.0, ended=285.0)
    return commits, pulls


@pytest.mark.parametrize("whole_shards", [False, True])
def test_a_right_history(whole_shards: bool) -> None:
    assert list(complaints(SHAPE, *right(), whole_shards=whole_shards)) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (changed(12, twice), "more than once"),
        (changed(12, lost), "had ended before a pull"),
        (changed(12, lost), "no longer sees"),
        (changed(12, lost), "are in it as a whole"),
        (changed(8, torn), "in a part of the shard"),
        (changed(12, from_the_future), "began after a pull"),
        (same_number, "each once"),
        (numbers_against_time, "has a smaller number"),
        (clock_ahead, "counts 7 commits"),
        (in_two_orders, "cannot have come one after the other"),
    ],
)
def test_a_wrong_history(wrong: Callable[[History], History], words: str) -> None:
    found = list(complaints(SHAPE, *wrong(right()), whole_shards=True))
    assert any(words in complaint for complaint in found), found


def test_elements_in_two_orders() -> None:
    found = list(complaints(SHAPE, *in_two_orders(right()), whole_shards=False))
    assert any("cannot have come" in complaint for complaint in found), found
