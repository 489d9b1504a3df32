"""The one small message per rank at the start of a synchronised step: who steps, with how many samples, who has failed.

Uneven loaders, failed threads, wishes to stop and ranks that have come apart are all seen in the headers, before any
gradient is sent. `Reducer` decides what follows from a header.
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
UPDATING, CLIPPING, GATHERING = 4, 5, 6  # what the ranks of a sharded optimiser do together outside backward
_DOING = {STEPPING: "backward", UPDATING: "step", CLIPPING: "clip_grad_norm_", GATHERING: "full_state_dict"}
_EQUAL, _GIVEN = 0, 1  # kinds of weights: all ranks alike, or given by `samples(k)`


@dataclass(frozen=True)
class Header:
    """What all ranks said at the start of a step; equal on every rank."""

    stepping: tuple[int, ...]  # ranks that bring a gradient
    total: int  # sum of the weights of those ranks: number of samples, or of ranks
    stopping: bool  # some rank wishes to stop after this step
    doing: int = STEPPING  # or another state; FINISHED if all ranks have finished
    finished: tuple[int, ...] = ()  # ranks that bring no gradient any more


class StepCheck(Protocol):
    """A check that each rank makes before every step, and whose failure on one rank all ranks report."""

    def check(self, *, finishing: bool) -> int:
        """Returns 0, or the number of the error that this rank has found."""

    def describe_error(self, number: int) -> Exception:
        """Returns the error of this number, found by any rank."""


class StepHeader:
    """Exchanges the headers of one optimiser's ranks, once per step.

    Args:
        collectives: of the optimiser's ranks.
        fingerprint: of the buckets.
        check: made before every step; None: no check.

    Attributes:
        fingerprint: a number that differs where buckets differ.
    """

    def __init__(self, collectives: Collectives, fingerprint: int, check: StepCheck | None = None) -> None:
        self._collectives, self._ranks = collectives, collectives.topology
        self.fingerprint, self._check = fingerprint, check
        self._everyone = tuple(range(self._ranks.size))

    def start(
        self, state: int, samples: int | None, steps: int, stopping: bool, error: int = 0
    ) -> Callable[[bool], Header | None]:
        """Starts the exchange.

        Args:
            state: STEPPING, FINISHED, FAILED or another of the states above.
            samples: weight of this rank's gradient, or None for equal weights.
            steps: optimiser steps taken so far.
            stopping: whether this rank wishes to stop.
            error: number of an error that this rank has found already; 0: none, so that the check is made.

        Returns:
            A function: given True, the function waits for the header; given False, it returns None while a rank's
            header is missing.
        """
        weight, kind = (1, _EQUAL) if samples is None else (samples, _GIVEN)
        if self._check is not None and not error:
            error = self._check.check(finishing=state == FINISHED)
        mine = np.array([self.fingerprint, state, weight, kind, steps, stopping, error], np.int64)
        everyone = np.empty((self._ranks.size, mine.size), np.int64)
        sequence = self._ranks.begin()
        request = self._collectives.start_words_gather(mine, everyone)

        def get(block: bool) -> Header | None:
            if block:
                self._ranks.wait(request, "a synchronised step", sequence)
            elif not request.Test():
                return None
            return self._read(everyone)

        return get

    def _read(self, everyone: np.ndarray[Any, Any]) -> Header:
        first, *rest = everyone.tolist()
        if all(other == first for other in rest) and first[1] != FAILED and not first[6]:
            return self._when_alike(first)  # the usual case; numpy would take longer just after backward
        return self._when_not_alike(everyone)

    def _when_alike(self, one: list[int]) -> Header:
        _, state, weight, _, _, stopping, _ = one
        stepping = self._everyone if state == STEPPING else ()
        finished = self._everyone if state == FINISHED else ()
        return Header(stepping, weight * len(stepping), bool(stopping), state, finished)

    def _when_not_alike(self, everyone: np.ndarray[Any, Any]) -> Header:
        fingerprints, states, weights, kinds, steps, stops, errors = everyone.T
        if (states == FAILED).any():
            self._raise_failure()
        if (fingerprints != fingerprints[0]).any():
            found = disagreement(f"layout {x}" for x in fingerprints)
            raise MismatchError(f"the ranks hold different models: {found}")
        if errors.any() and self._check is not None:
            raise self._check.describe_error(int(errors[errors > 0][0]))
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
