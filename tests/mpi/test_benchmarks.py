"""The contenders of `mpidl bench` inside ranks: they are right, and would be found out if they were not."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl.cli.bench import allreduce, parameter_server, targets, training
from mpidl.cli.bench.harness import Case, Contender, Plan, measure
from mpidl.cli.bench.ranks import Together
from mpidl.parameter_server.center.center import Center
from mpidl.synchronous.drift import NOTHING, Drift
from mpidl.synchronous.reduction.bucket import BucketMemory

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
memory = importlib.import_module("memory")

RANKS = (2,)
ANY_MPI = True
TRAINERS = (
    targets.INDEPENDENT,
    targets.SYNCHRONOUS,
    targets.SHARDED,
    targets.DDP,
    targets.REDUCE_UPDATE,
    targets.SHARDED_UPDATE,
)


@pytest.fixture
def ranks(world_comm: mpidl.Communicator) -> Iterator[Together]:
    together = Together(world_comm)
    yield together
    together.free()


def complaints(ranks: Together, benchmark: Any, at: int = -1) -> dict[str, str]:
    """Runs each contender of a quick case once between two checks; returns what this rank finds wrong."""
    found: dict[str, str] = {}
    wanted = benchmark.cases(ranks.size, True)[at]
    for case, prepared in benchmark.fields(ranks, True):
        if case != wanted:
            continue
        with prepared as field:
            for one in field.contenders:
                before = one.check()
                one.run()
                found[one.name] = one.check() or before
    return found


def test_sums_are_right_and_gloo_s_too(ranks: Together) -> None:
    assert complaints(ranks, allreduce) == {targets.OURS: "", targets.MPI: "", targets.MEMCPY: "", targets.GLOO: ""}


def test_an_allreduce_that_never_sends_is_found(ranks: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.comm, "allreduce", lambda x, out: np.multiply(x, ranks.size, out=out))
    assert "expected" in complaints(ranks, allreduce)[targets.OURS]


def test_gradients_are_right(ranks: Together) -> None:
    assert set(complaints(ranks, training).items()) == {(name, "") for name in TRAINERS}


def test_gradients_that_were_never_reduced_are_found(ranks: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BucketMemory, "write_back", lambda *_, **__: None)
    monkeypatch.setattr(Drift, "words", lambda *_, **__: NOTHING)  # replicas that come apart are found before
    monkeypatch.setattr("mpidl.optim.verify.find_difference", lambda *_: None)
    found = complaints(ranks, training)
    assert "gradients are wrong" in found.pop(targets.SYNCHRONOUS)
    assert set(found.values()) == {""}


@pytest.mark.parametrize("way", memory.WAYS)
def test_memory_is_measured(ranks: Together, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(memory, "_WIDTH", 700)
    report = memory.measure(way, ranks)
    assert report.weights == pytest.approx(6 * 700 * 700 * 4 / 2**20)
    assert 0 < report.rank / report.weights < 20  # tests before this one have left memory that is used again


def test_no_commit_is_missing(ranks: Together) -> None:
    both = {targets.SERVER: "", targets.ONE_SIDED: ""}
    assert complaints(ranks, parameter_server, at=1) == both | {targets.DOWNPOUR: ""}
    assert complaints(ranks, parameter_server) == both | {targets.MASTER: "", targets.RPC: ""}


def test_a_lost_commit_is_found(ranks: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, calls = Center.commit_and_pull, []

    def lossy(self: Center, delta: Any, *rest: Any, **more: Any) -> Any:
        calls.append(1)
        return commit(self, delta if len(calls) != 2 or ranks.rank else np.zeros_like(delta), *rest, **more)

    monkeypatch.setattr(Center, "commit_and_pull", lossy)
    assert "miss a commit" in complaints(ranks, parameter_server, at=1)[targets.SERVER]


def test_ranks_that_sit_out_do_not_disturb(ranks: Together) -> None:
    with next(iter(parameter_server.fields(ranks, True)))[1] as field:
        assert (field.ranks is None) == (ranks.rank == 1)
        assert [one.check() for one in field.contenders] == ([""] * 3 if ranks.rank == 0 else [])
    ranks.rest()


def test_the_slowest_rank_s_time_is_everybody_s(ranks: Together) -> None:
    sleep: Callable[[], None] = lambda: time.sleep(0.05 * ranks.rank)  # noqa: E731
    (series,) = measure(Case("case", {}, 1.0), [Contender("c", sleep, lambda: "")], ranks, Plan(1, 3, 0.0))
    assert min(series.seconds) >= 0.05
    assert len(set(map(str, ranks.everywhere(series.seconds)))) == 1


def test_a_wrong_result_on_one_rank_is_a_failure_on_all(ranks: Together) -> None:
    wrong = Contender("c", lambda: None, lambda: "torn" * ranks.rank)
    (series,) = measure(Case("case", {}, 1.0), [wrong], ranks, Plan(1, 3, 0.0))
    assert (series.complaint, series.seconds) == ("rank 1: torn", [])
