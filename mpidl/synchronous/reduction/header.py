"""The one small message per rank and synchronised step: who steps, with how many samples, who has finished or failed.

Uneven loaders, failed threads, wishes to stop and ranks that have come apart are all seen here, before any gradient
moves. What the words lead to is decided in `reducer` and `synchronous`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpidl.collectives import Collectives
from mpidl.errors import ArgumentError, MismatchError, RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.mpi.agreement import disagreement

STEPPING, FINISHED, FAILED = 1, 2, 3
UPDATING, CLIPPING, GATHERING = 4, 5, 6  # what only a sharded step does together, apart from backward
_DOING = {STEPPING: "backward", UPDATING: "step", CLIPPING: "clip_grad_norm_", GATHERING: "full_state_dict"}
_EQUAL, _GIVEN = 0, 1  # weights: all ranks alike, or by `samples(k)`


@dataclass(frozen=True)
class Header:
    """What all ranks said at the start of a step; equal on every rank."""

    stepping: tuple[int, ...]  # ranks that bring a gradient
    total: int  # sum of their weights: number of samples, or of ranks
    stopping: bool  # some rank wishes to stop after this step
    doing: int = STEPPING  # or UPDATING and so on; FINISHED if nobody does anything
    finished: tuple[int, ...] = ()  # ranks that bring none any more


class Watcher(Protocol):
    """Looks at what must hold at every step."""

    def trouble(self, *, finishing: bool) -> int:
        """Returns 0, or a number that says what is wrong on this rank."""

    def explain(self, trouble: int) -> Exception:
        """Returns what the trouble of any rank is."""


class StepHeader:
    """Exchanges the words of one optimiser's ranks, once per step.

    Attributes:
        layout: a number that differs where buckets differ.
    """

    def __init__(self, ranks: Collectives, layout: int, watcher: Watcher | None = None) -> None:
        self._collectives, self._ranks = ranks, ranks.topology
        self.layout, self._watcher = layout, watcher
        self._everyone = tuple(range(self._ranks.size))

    def start(
        self, state: int, samples: int | None, steps: int, stopping: bool, trouble: int = 0
    ) -> Callable[[bool], Header | None]:
        """Starts the exchange.

        Args:
            state: STEPPING, FINISHED, FAILED or another of those above.
            samples: weight of this rank's gradient, or None for equal weights.
            steps: optimiser steps taken so far.
            stopping: this rank wishes to stop.
            trouble: what else the watcher's `explain` will say.

        Returns:
            A function: given True it waits for the header, given False it returns None while it is not there.
        """
        weight, kind = (1, _EQUAL) if samples is None else (samples, _GIVEN)
        if self._watcher is not None and not trouble:
            trouble = self._watcher.trouble(finishing=state == FINISHED)
        words = np.array([self.layout, state, weight, kind, steps, stopping, trouble], np.int64)
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
        first, *rest = words.tolist()
        if all(other == first for other in rest) and first[1] != FAILED and not first[6]:
            return self._when_alike(first)  # nearly always; numpy would take longer, in caches that backward has filled
        return self._when_not_alike(words)

    def _when_alike(self, words: list[int]) -> Header:
        _, state, weight, _, _, stopping, _ = words
        stepping = self._everyone if state == STEPPING else ()
        finished = self._everyone if state == FINISHED else ()
        return Header(stepping, weight * len(stepping), bool(stopping), state, finished)

    def _when_not_alike(self, words: np.ndarray[Any, Any]) -> Header:
        layouts, states, weights, kinds, steps, stops, troubles = words.T
        if (states == FAILED).any():
            self._raise_failure()
        if (layouts != layouts[0]).any():
            raise MismatchError(f"the ranks hold different models: {disagreement(f'layout {x}' for x in layouts)}")
        if troubles.any() and self._watcher is not None:
            raise self._watcher.explain(int(troubles[troubles > 0][0]))
        stepping = tuple(int(r) for r in np.flatnonzero(states == STEPPING))
        doing = self._doing(states)
        if len({int(kinds[r]) for r in stepping}) > 1:
            texts = ["samples(k)" if k == _GIVEN else "equal weights" for k in kinds]
            raise ArgumentError(
                f"weights differ in kind: {disagreement(texts)}; use samples(k) on all ranks or on none"
            )
        if len({int(steps[r]) for r in stepping}) > 1:
            raise MismatchError(f"the ranks have come apart: {disagreement(f'{n} optimizer steps' for n in steps)}")
        total = int(sum(int(weights[r]) for r in stepping))
        finished = tuple(int(r) for r in np.flatnonzero(states == FINISHED))
        return Header(stepping, total, bool(stops.any()), doing, finished)

    @staticmethod
    def _doing(states: np.ndarray[Any, Any]) -> int:
        """Returns what all ranks do that have not finished."""
        found = {int(state) for state in states} - {FINISHED}
        if len(found) > 1:
            texts = [_DOING.get(int(state), "finish") for state in states]
            raise MismatchError(f"the ranks have come apart: {disagreement(texts)}")
        return found.pop() if found else FINISHED

    def _raise_failure(self) -> None:
        reason = exit_protocol.thread_failure() or ""
        reasons = self._ranks.gather_bytes(reason.encode(), "reasons of a failure")
        failed = [f"rank {r}: {text.decode()}" for r, text in enumerate(reasons) if text]
        raise RankFailedError(f"the step was not taken, {'; '.join(failed)}")
