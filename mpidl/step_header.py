"""The one small message per rank and synchronised step: who steps, with how many samples, who has finished or failed.

Uneven loaders, failed threads, wishes to stop and ranks that have come apart are all seen here, before any gradient
moves. What the words lead to is decided in `reducer` and `synchronous`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidl import leaving
from mpidl.collectives import Collectives, disagreement
from mpidl.errors import ArgumentError, MismatchError, RankFailedError

STEPPING, FINISHED, FAILED = 1, 2, 3
_EQUAL, _GIVEN = 0, 1  # weights: all ranks alike, or by `samples(k)`


@dataclass(frozen=True)
class Header:
    """What all ranks said at the start of a step; equal on every rank."""

    stepping: tuple[int, ...]  # ranks that bring a gradient
    total: int  # sum of their weights: number of samples, or of ranks
    stopping: bool  # some rank wishes to stop after this step


class StepHeader:
    """Exchanges the words of one optimiser's ranks, once per step."""

    def __init__(self, ranks: Collectives, layout_hash: int) -> None:
        self._collectives, self._ranks = ranks, ranks.topology
        self._layout = layout_hash

    def start(self, state: int, samples: int | None, steps: int, stopping: bool) -> Callable[[bool], Header | None]:
        """Starts the exchange.

        Args:
            state: STEPPING, FINISHED or FAILED.
            samples: weight of this rank's gradient, or None for equal weights.
            steps: optimiser steps taken so far.
            stopping: this rank wishes to stop.

        Returns:
            A function: given True it waits for the header, given False it returns None while it is not there.
        """
        weight, kind = (1, _EQUAL) if samples is None else (samples, _GIVEN)
        words = np.array([self._layout, state, weight, kind, steps, stopping], np.int64)
        everyone = np.empty((self._ranks.size, words.size), np.int64)
        sequence = self._ranks.begin()
        request = self._collectives.start_words_gather(words, everyone)

        def get(block: bool) -> Header | None:
            if block:
                self._ranks.wait(request, "a synchronised step", sequence)
            elif not request.Test():
                return None
            return self._read(everyone)

        return get

    def _read(self, words: np.ndarray[Any, Any]) -> Header:
        layouts, states, weights, kinds, steps, stops = words.T
        if (states == FAILED).any():
            self._raise_failure()
        if (layouts != layouts[0]).any():
            raise MismatchError(f"the ranks hold different models: {disagreement(f'layout {x}' for x in layouts)}")
        stepping = tuple(int(r) for r in np.flatnonzero(states == STEPPING))
        if len({int(kinds[r]) for r in stepping}) > 1:
            texts = ["samples(k)" if k == _GIVEN else "equal weights" for k in kinds]
            raise ArgumentError(
                f"weights differ in kind: {disagreement(texts)}; use samples(k) on all ranks or on none"
            )
        if len({int(steps[r]) for r in stepping}) > 1:
            raise MismatchError(f"the ranks have come apart: {disagreement(f'{n} optimizer steps' for n in steps)}")
        return Header(stepping, int(sum(int(weights[r]) for r in stepping)), bool(stops.any()))

    def _raise_failure(self) -> None:
        reason = leaving.thread_failure() or ""
        reasons = self._ranks.gather_bytes(reason.encode(), "reasons of a failure")
        failed = [f"rank {r}: {text.decode()}" for r, text in enumerate(reasons) if text]
        raise RankFailedError(f"the step was not taken, {'; '.join(failed)}")
