"""The one small message per rank at the start of a synchronised step: who steps, with how many samples, who has failed.

Uneven loaders, failed threads, wishes to stop and ranks that have come apart are all seen in the headers, before any
gradient is sent. `Reducer` decides what follows from a header.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpidl.collectives import Collectives
from mpidl.errors import ArgumentError, MismatchError, RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.mpi.agreement import disagreement
from mpidl.optim.state import agree
from mpidl.synchronous.drift import NOTHING, WORDS, Drift

STEPPING, FINISHED, FAILED = 1, 2, 3
UPDATING, CLIPPING, GATHERING = 4, 5, 6  # what the ranks of a sharded optimiser do together outside backward,
BROADCASTING, VERIFYING, EVALUATING = 7, 8, 9  # and those of any
NORMING, UNSCALING = 10, 11  # what torch does to the marks of sharded gradients
REDUCING = 12  # as STEPPING, but outside backward: the gradients are those that no backward has reduced
_BRINGING = (STEPPING, REDUCING)
_DOING = {
    STEPPING: "backward",
    UPDATING: "step",
    CLIPPING: "clip_grad_norm_",
    GATHERING: "full_state_dict",
    BROADCASTING: "broadcast_parameters",
    VERIFYING: "verify",
    EVALUATING: "the end of a closure",
    NORMING: "the norm of a gradient",
    UNSCALING: "GradScaler.unscale_",
}
_EQUAL, _GIVEN = 0, 1  # kinds of weights: all ranks alike, or given by `samples(k)`


@dataclass(frozen=True)
class Header:
    """What all ranks said at the start of a step; equal on every rank."""

    stepping: tuple[int, ...]  # ranks that bring a gradient
    total: int  # sum of the weights of those ranks: number of samples, or of ranks
    stopping: bool  # some rank wishes to stop after this step
    doing: int = STEPPING  # also for REDUCING; or another state; FINISHED if all ranks have finished
    finished: tuple[int, ...] = ()  # ranks that bring no gradient any more
    in_backward: tuple[int, ...] = ()  # ranks of `stepping` that are inside a backward


class StepCheck(Protocol):
    """A check that each rank makes before every step, and whose failure on one rank all ranks report."""

    def check(self, *, finishing: bool) -> int:
        """Returns 0, or the number of the error that this rank has found."""

    def describe_error(self, number: int) -> Exception:
        """Returns the error of this number, found by any rank."""


class ModelCheck(StepCheck, Protocol):
    """A check that also knows what must be alike on all ranks."""

    def describe(self) -> dict[str, Any]:
        """Returns what must be alike, as JSON-able items."""


class StepHeader:
    """Exchanges the headers of one optimiser's ranks, once per step.

    Args:
        collectives: of the optimiser's ranks.
        fingerprint: of the buckets.
        names: of the parameters.
        check: words the errors that ranks have found, and what differs between ranks.

    Attributes:
        fingerprint: a number that differs where buckets differ.
        drift: adds words of its own, which tell whether the replicas are equal; None: they are not compared.
    """

    def __init__(self, collectives: Collectives, fingerprint: int, names: Sequence[str], check: ModelCheck) -> None:
        self._collectives, self._ranks = collectives, collectives.topology
        self.fingerprint, self._names, self._check = fingerprint, names, check
        self.drift: Drift | None = None
        self._everyone = tuple(range(self._ranks.size))

    def start(
        self, state: int, samples: int | None, steps: int, stopping: bool, *, error: int, new: int | None
    ) -> Callable[[bool], Header | None]:
        """Starts the exchange.

        Args:
            state: STEPPING, FINISHED, FAILED or another of the states above.
            samples: weight of this rank's gradient, or None for equal weights.
            steps: optimiser steps taken so far.
            stopping: whether this rank wishes to stop.
            error: number of an error that this rank has found; 0: none.
            new: index of a parameter with a gradient that no backward has reduced, for messages.

        Returns:
            A function: given True, the function waits for the header; given False, it returns None while a rank's
            header is missing.
        """
        weight, kind = (1, _EQUAL) if samples is None else (samples, _GIVEN)
        own = NOTHING if self.drift is None else self.drift.words(finishing=state in (FINISHED, FAILED))
        words = [self.fingerprint, state, weight, kind, steps, stopping, error, 0 if new is None else 1 + new, *own]
        mine = np.array(words, np.int64)
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
        if all(other == first for other in rest) and first[1] != FAILED and not first[6] and not first[-1]:
            return self._when_alike(first)  # the usual case; numpy would take longer just after backward
        return self._when_not_alike(everyone)

    def _when_alike(self, one: list[int]) -> Header:
        _, state, weight, _, _, stopping, *_ = one
        stepping = self._everyone if state in _BRINGING else ()
        finished = self._everyone if state == FINISHED else ()
        doing = STEPPING if state == REDUCING else state
        in_backward = self._everyone if state == STEPPING else ()
        return Header(stepping, weight * len(stepping), bool(stopping), doing, finished, in_backward)

    def _when_not_alike(self, everyone: np.ndarray[Any, Any]) -> Header:
        fingerprints, states, weights, kinds, steps, stops, errors, *_ = everyone.T
        if (states == FAILED).any():
            self._raise_failure()
        if errors.any():
            raise self._check.describe_error(int(errors[errors > 0][0]))
        if (fingerprints != fingerprints[0]).any():
            agree(self._ranks, "the model has changed", self._check.describe(), None)
            found = disagreement(f"layout {x}" for x in fingerprints)
            raise MismatchError(f"the ranks hold different models: {found}")
        stepping = tuple(int(r) for r in np.flatnonzero(np.isin(states, _BRINGING)))
        doing = self._doing(everyone)
        reducing = states == REDUCING
        if (states == STEPPING).any() and (everyone[reducing, 7] == 0).any():
            raise self._apart(everyone)  # a rank that steps without a gradient has missed a backward of the others
        if len({int(kinds[r]) for r in stepping}) > 1:
            texts = ["samples(k)" if k == _GIVEN else "equal weights" for k in kinds]
            raise ArgumentError(
                f"weights differ in kind: {disagreement(texts)}; use samples(k) on all ranks or on none"
            )
        if stepping and len({int(steps[r]) for r in stepping} | {int(n) for n in steps if n > steps[stepping[0]]}) > 1:
            raise self._apart(everyone)
        if self.drift is not None:
            self.drift.compare(everyone[:, -WORDS:].tolist(), np.flatnonzero(states != FINISHED).tolist())
        total = int(sum(int(weights[r]) for r in stepping))
        finished = tuple(int(r) for r in np.flatnonzero(states == FINISHED))
        in_backward = tuple(int(r) for r in np.flatnonzero(states == STEPPING))
        return Header(stepping, total, bool(stops.any()), doing, finished, in_backward)

    def _doing(self, everyone: np.ndarray[Any, Any]) -> int:
        """Returns what all ranks do that have not finished."""
        found = {STEPPING if state == REDUCING else int(state) for state in everyone[:, 1]} - {FINISHED}
        if len(found) > 1:
            raise self._apart(everyone)
        return found.pop() if found else FINISHED

    def _apart(self, everyone: np.ndarray[Any, Any]) -> MismatchError:
        texts = []
        for _, doing, _, _, steps, _, _, new, *_ in everyone.tolist():
            text = _DOING.get(doing, "finish")
            if doing == REDUCING:
                which = f"with the gradient of {self._names[new - 1]}, which no backward has reduced"
                text = f"step or reduce, {which}" if new else "step or reduce without a new gradient"
            texts.append(f"{text}, after {steps} optimizer steps")
        advice = "; gradients set by hand are reduced at step(): set them on all ranks, or call reduce() on all"
        by_hand = (everyone[:, 7] > 0).any()
        return MismatchError(f"the ranks have come apart: {disagreement(texts)}{advice if by_hand else ''}")

    def _raise_failure(self) -> None:
        reason = exit_protocol.thread_failure() or ""
        reasons = self._ranks.gather_bytes(reason.encode(), "reasons of a failure")
        failed = [f"rank {r}: {text.decode()}" for r, text in enumerate(reasons) if text]
        raise RankFailedError(f"the step was not taken, {'; '.join(failed)}")
