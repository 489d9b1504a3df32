"""Medians and quartiles of rounds, and how sure a median is; pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DRAWS = 2000  # of the bootstrap: its quartiles are then good to about 2 % of their distance

Series = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Estimate:
    """A figure and how far it can be trusted."""

    value: float
    quartiles: tuple[float, float]  # of the rounds
    sure: tuple[float, float]  # bootstrap quartiles of the value itself: a decision stands on these


def quartiles(values: Sequence[float] | Series) -> tuple[float, float, float]:
    """Returns the first quartile, the median and the third quartile."""
    low, middle, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Returns the median over rounds of above / below; round i of one belongs to round i of the other."""
    rounds = np.asarray(above, float) / np.asarray(below, float)
    low, middle, high = quartiles(rounds)
    return Estimate(middle, (low, high), _bootstrap(lambda chosen: np.median(rounds[chosen], axis=1), rounds.size))


def difference(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Returns the median over rounds of above - below; rounds belong together as in `ratio`."""
    rounds = np.asarray(above, float) - np.asarray(below, float)
    low, middle, high = quartiles(rounds)
    return Estimate(middle, (low, high), _bootstrap(lambda chosen: np.median(rounds[chosen], axis=1), rounds.size))


def excess_ratio(contender: Sequence[float], peer: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Returns median(contender - baseline) / median(peer - baseline): what is paid on top, as a part of the peer's.

    The ratio is of medians and not of single rounds, in which the peer's excess may be nearly nothing; so the quartiles
    of the rounds are those of (contender - baseline), divided by the peer's median.
    """
    own = np.asarray(contender, float) - np.asarray(baseline, float)
    others = np.asarray(peer, float) - np.asarray(baseline, float)
    scale = float(np.median(others))
    low, middle, high = quartiles(own)

    def statistic(chosen: Series) -> Series:
        found: Series = np.median(own[chosen], axis=1) / np.median(others[chosen], axis=1)
        return found

    return Estimate(middle / scale, (low / scale, high / scale), _bootstrap(statistic, own.size))


def _bootstrap(statistic: Callable[[Series], Any], rounds: int) -> tuple[float, float]:
    """Returns the quartiles of a statistic over rounds drawn with replacement; the same for the same rounds."""
    chosen = np.random.default_rng(0).integers(rounds, size=(_DRAWS, rounds))
    low, high = np.quantile(statistic(chosen), (0.25, 0.75))
    return float(low), float(high)
