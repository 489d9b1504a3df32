"""Ratios, quartiles and verdicts of `mpidl bench`, on rounds made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mpidl.cli.bench import judging, ratios
from mpidl.cli.bench.harness import Series
from mpidl.cli.bench.judging import ABSENT, FAILED, MET, MISSED, UNDECIDED, decide
from mpidl.cli.bench.results import Result
from mpidl.cli.bench.targets import Target

EVEN = [1.0] * 20
SPEED = Target("b", "t", "ours", "theirs", "speed", ">=", 2.0, {"n": (10, 20)})
BOTH = Target("b", "t", "ours", "theirs", "speed", ">=", 2.0, yardstick="yard")
EXCESS = Target("b", "t", "ours", "theirs", "excess", "<=", 0.25, baseline="alone")


def result(mpi: str = "MPICH", ranks: int = 2, complaints: Sequence[str] = (), **seconds: list[float]) -> Result:
    run: dict[str, Any] = {"benchmark": "b", "ranks": ranks, "versions": {"mpi": f"{mpi} 5.0"}}
    made = [
        Series("case", {"n": 10}, 1.0, name, [] if name in complaints else rounds, 1, "5 for 4" * (name in complaints))
        for name, rounds in seconds.items()
    ]
    return Result(run, tuple(made), {})


def only(target: Target, *results: Result) -> judging.Verdict:
    (verdict,) = judging.judge(results, [target])
    return verdict


def test_quartiles_of_known_numbers() -> None:
    assert ratios.quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine became ten times slower meanwhile; each round's ratio does not know."""
    slowing = [1.0 + number for number in range(20)]
    estimate = ratios.ratio([2 * seconds for seconds in slowing], slowing)
    assert (estimate.value, estimate.quartiles, estimate.sure) == (2, (2, 2), (2, 2))


def test_the_median_is_surer_than_a_round_is() -> None:
    rounds = [1 + (number * 7 % 20) / 20 for number in range(20)]  # 1.00 to 1.95
    estimate = ratios.ratio(rounds, EVEN)
    assert estimate.value == pytest.approx(1.475)
    assert estimate.quartiles == pytest.approx((1.2375, 1.7125))
    low, high = estimate.sure
    assert 1.2375 < low < 1.475 < high < 1.7125
    assert ratios.ratio(rounds, EVEN) == estimate


def test_what_is_paid_on_top() -> None:
    estimate = ratios.excess_ratio([11.0, 12, 13], [14.0, 14, 14], [10.0, 10, 10])
    assert estimate.value == 2 / 4
    assert estimate.quartiles == (1.5 / 4, 2.5 / 4)
    assert 1 / 4 <= estimate.sure[0] <= 0.5 <= estimate.sure[1] <= 3 / 4


@pytest.mark.parametrize(
    ("sure", "relation", "verdict"),
    [
        ((2.0, 3.0), ">=", MET),
        ((1.0, 1.9), ">=", MISSED),
        ((1.9, 2.1), ">=", UNDECIDED),
        ((1.0, 2.0), "<=", MET),
        ((2.1, 3.0), "<=", MISSED),
        ((1.9, 2.1), "<=", UNDECIDED),
    ],
)
def test_a_target_that_the_quartiles_straddle_is_undecided(
    sure: tuple[float, float], relation: str, verdict: str
) -> None:
    assert decide(sure, relation, 2.0) == verdict


@pytest.mark.parametrize(("theirs", "verdict"), [(2.5, MET), (1.5, MISSED)])
def test_speed_is_the_peer_s_time_over_ours(theirs: float, verdict: str) -> None:
    found = only(SPEED, result(ours=EVEN, theirs=[theirs] * 20))
    assert found.verdict == verdict
    assert found.estimate is not None
    assert found.estimate.value == theirs


def test_noise_around_the_bound_is_undecided() -> None:
    noisy = [1.5, 2.5] * 10
    assert only(SPEED, result(ours=EVEN, theirs=noisy)).verdict == UNDECIDED


@pytest.mark.parametrize("wrong", ["ours", "theirs"])
def test_a_wrong_result_is_a_failure_and_has_no_figure(wrong: str) -> None:
    found = only(SPEED, result(complaints=[wrong], ours=EVEN, theirs=[9.0] * 20))
    assert (found.verdict, found.estimate) == (FAILED, None)
    assert wrong in found.note


def test_few_rounds_decide_nothing() -> None:
    found = only(SPEED, result(ours=[1.0] * 14, theirs=[9.0] * 14))
    assert (found.verdict, found.note) == (UNDECIDED, "only 14 rounds")


def test_what_was_not_measured_is_said() -> None:
    assert only(SPEED, result(theirs=EVEN)).verdict == ABSENT
    assert "ours did not take part" in only(SPEED, result(theirs=EVEN)).note
    assert "theirs did not take part" in only(SPEED, result(ours=EVEN)).note
    far = Target("b", "t", "ours", "theirs", "speed", ">=", 2.0, {"n": (11, 20)})
    assert only(far, result(ours=EVEN, theirs=EVEN)).verdict == ABSENT
    assert judging.judge([result(ours=EVEN)], [Target("c", "t", "ours", "theirs", "speed", ">=", 2.0)]) == []


def test_seconds_more_than_the_peer() -> None:
    more = Target("b", "t", "ours", "theirs", "seconds", "<=", 0.15)
    assert only(more, result(ours=[1.1] * 20, theirs=EVEN)).verdict == MET
    assert only(more, result(ours=[1.2] * 20, theirs=EVEN)).verdict == MISSED
    assert only(more, result(ours=[1.1, 1.2] * 10, theirs=EVEN)).verdict == UNDECIDED


def test_excess_over_a_baseline() -> None:
    alone, theirs = [10.0] * 20, [20.0] * 20
    assert only(EXCESS, result(ours=[12.0] * 20, theirs=theirs, alone=alone)).verdict == MET
    assert only(EXCESS, result(ours=[13.0] * 20, theirs=theirs, alone=alone)).verdict == MISSED
    assert only(EXCESS, result(ours=[12.0, 13.0] * 10, theirs=theirs, alone=alone)).verdict == UNDECIDED
    assert only(EXCESS, result(ours=[12.0] * 20, theirs=alone, alone=alone)).verdict == UNDECIDED
    assert only(EXCESS, result(complaints=["alone"], ours=alone, theirs=theirs, alone=alone)).verdict == FAILED


def test_one_mpi_cannot_meet_a_target_against_the_faster_of_two() -> None:
    assert only(BOTH, result(ours=EVEN, theirs=[9.0] * 20, yard=EVEN)).verdict == UNDECIDED
    assert only(BOTH, result(ours=EVEN, theirs=[1.5] * 20, yard=EVEN)).verdict == MISSED


def test_the_faster_of_two_mpis_is_the_peer() -> None:
    """On the second machine everything took twice as long; by the yardstick its MPI is the faster one: 5 / 2 < 4."""
    first = result("MPICH", ours=EVEN, theirs=[4.0] * 20, yard=EVEN)
    second = result("Open MPI", ours=[2.0] * 20, theirs=[5.0] * 20, yard=[2.0] * 20)
    found = judging.judge([first, second], [BOTH])
    assert [one.mpi for one in found] == ["MPICH", "Open MPI"]
    assert [one.estimate.value for one in found if one.estimate is not None] == [2.5, 2.5]
    assert [one.verdict for one in found] == [MET, MET]
    assert "the other MPI" in found[0].note
    assert "this MPI" in found[1].note
    slower = result("Open MPI", ours=EVEN, theirs=[1.5] * 20, yard=EVEN)
    assert [one.verdict for one in judging.judge([first, slower], [BOTH])] == [MISSED, MISSED]


def test_runs_with_other_ranks_or_another_run_on_the_same_mpi_are_no_second_mpi() -> None:
    first = result("MPICH", ours=EVEN, theirs=[4.0] * 20, yard=EVEN)
    for other in (
        result("Open MPI", ranks=4, ours=EVEN, theirs=EVEN, yard=EVEN),
        result("MPICH", ours=EVEN, theirs=EVEN, yard=EVEN),
        result("Open MPI", complaints=["theirs"], ours=EVEN, theirs=EVEN, yard=EVEN),
    ):
        assert judging.judge([first, other], [BOTH])[0].verdict == UNDECIDED
