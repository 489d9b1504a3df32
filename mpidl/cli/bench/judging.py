"""Targets against results. A target whose bound lies within the bootstrap quartiles of the figure is undecided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mpidl.cli.bench import ratios
from mpidl.cli.bench.harness import Series
from mpidl.cli.bench.ratios import Estimate
from mpidl.cli.bench.results import Result
from mpidl.cli.bench.targets import TARGETS, Target

MET, MISSED, UNDECIDED, FAILED, ABSENT = "met", "missed", "undecided", "failed", "not measured"
FEWEST_ROUNDS = 15


@dataclass(frozen=True)
class Verdict:
    """One target in one case of one run."""

    target: Target
    case: str
    mpi: str  # on which it ran
    verdict: str
    estimate: Estimate | None = None
    note: str = ""


def judge(results: Sequence[Result], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Returns a verdict for each target of the results' benchmark, case and run.

    Args:
        results: of one benchmark; runs on several MPIs are compared with each other where a target asks for it.
        targets: all there are.
    """
    verdicts = []
    for target in targets:
        if target.benchmark != results[0].run["benchmark"]:
            continue
        found = [
            _judge(target, case, result, results)
            for result in results
            for case, parameters in result.cases.items()
            if target.fits(parameters)
        ]
        verdicts += found or [Verdict(target, "", "", ABSENT, note="no such case in this run")]
    return verdicts


def decide(sure: tuple[float, float], relation: str, bound: float) -> str:
    """Returns met or missed if both quartiles of the figure agree on it, else undecided."""
    low, high = ((x >= bound) if relation == ">=" else (x <= bound) for x in sure)
    if low != high:
        return UNDECIDED
    return MET if low else MISSED


def _judge(target: Target, case: str, result: Result, results: Sequence[Result]) -> Verdict:
    own = result.find(case, target.contender)
    others = _peers(target, case, result, results)
    baseline = result.find(case, target.baseline) if target.baseline else None
    taking_part = [own, *others, *([baseline] if target.baseline else [])]
    missing = own is None or not others or (target.baseline and baseline is None)
    if missing or own is None:
        absent = target.contender if own is None else target.peer if not others else target.baseline
        return Verdict(target, case, result.mpi, ABSENT, note=f"{absent} did not take part")
    wrong = next((one for one in taking_part if one is not None and one.complaint), None)
    if wrong is not None:
        return Verdict(target, case, result.mpi, FAILED, note=f"{wrong.contender} gave a wrong result")
    peer = min(others, key=lambda one: ratios.quartiles(one.seconds)[1])
    estimate = _estimate(target, own, peer, baseline)
    if estimate is None:
        return Verdict(target, case, result.mpi, UNDECIDED, note=f"{target.peer} cost nothing over {target.baseline}")
    verdict, note = decide(estimate.sure, target.relation, target.bound), ""
    if len(own.seconds) < FEWEST_ROUNDS:
        verdict, note = UNDECIDED, f"only {len(own.seconds)} rounds"
    elif target.yardstick and len(others) > 1:
        note = f"against {target.peer} of {'this MPI' if peer is others[0] else 'the other MPI'}, the faster one"
    elif target.yardstick and verdict != MISSED:  # a second MPI can only be another, faster peer
        verdict, note = UNDECIDED, "against this MPI only: the faster of two is meant"
    return Verdict(target, case, result.mpi, verdict, estimate, note)


def _estimate(target: Target, own: Series, peer: Series, baseline: Series | None) -> Estimate | None:
    if target.quantity == "speed":
        return ratios.ratio(peer.seconds, own.seconds)
    if target.quantity == "time":
        return ratios.ratio(own.seconds, peer.seconds)
    if target.quantity == "seconds":
        return ratios.difference(own.seconds, peer.seconds)
    assert baseline is not None
    excess = ratios.quartiles([a - b for a, b in zip(peer.seconds, baseline.seconds, strict=True)])[1]
    return ratios.excess_ratio(own.seconds, peer.seconds, baseline.seconds) if excess > 0 else None


def _peers(target: Target, case: str, result: Result, results: Sequence[Result]) -> list[Series]:
    """Returns the peer's series in this run, then, where the target asks for it, those of runs on other MPIs.

    A series of another run is brought to this run's measure by the yardstick's median in both; its rounds are then
    paired with this run's by their order.
    """
    own = result.find(case, target.peer)
    found = [] if own is None else [own]
    yard = result.find(case, target.yardstick)
    if not target.yardstick or own is None or yard is None or yard.complaint:
        return found
    for other in results:
        if other.mpi == result.mpi or other.run["ranks"] != result.run["ranks"]:
            continue
        series, their_yard = other.find(case, target.peer), other.find(case, target.yardstick)
        if series is None or their_yard is None or len(series.seconds) != len(own.seconds) or not their_yard.seconds:
            continue  # not measured there, or not in a way that can be compared
        factor = ratios.quartiles(yard.seconds)[1] / ratios.quartiles(their_yard.seconds)[1]
        found.append(dataclasses.replace(series, seconds=[seconds * factor for seconds in series.seconds]))
    return found
