"""What the classes share whose optimiser takes local steps: closures, numbers of samples, gradients of one rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mpidl.errors import ArgumentError
from mpidl.optim import closures
from mpidl.optim.closures import Closure
from mpidl.optim.flat_parameters import FlatParameters
from mpidl.optim.sample_counts import SampleCounts


class LocalSteps(FlatParameters):
    """Adds the surface of a local step; a subclass calls `_begin_step`, `_step_inner`, `_end_count`, `_end_step`."""

    _closure: Closure | None = None  # to be evaluated by the inner optimiser in this step
    _loss: Any = None  # of this step

    def _lay_out(self) -> None:
        super()._lay_out()
        self._samples = SampleCounts([p for _, p in self._held])

    def no_sync(self) -> AbstractContextManager[None]:
        """Makes backward inside accumulate gradients, as it does outside: gradients stay on their rank here."""
        return nullcontext()

    def samples(self, count: int) -> AbstractContextManager[None]:
        """Says that backward inside is on so many samples of this rank.

        Args:
            count: number of samples in this rank's mean loss; with 0 the gradients made inside are dropped, even if
                they hold a NaN, and a step of 0 samples moves nothing.

        Raises:
            ArgumentError: `count` is not a whole number, 0 or more.
        """
        return self._samples.block(count)

    def _begin_step(self, closure: Closure | None) -> int | None:
        """Evaluates a closure now, if the optimiser evaluates it once; returns the step's number of samples, if known.

        The rule then finds the gradients where they would be after a backward of the user's own.
        """
        self._closure = self._loss = None
        if closure is not None:
            if not closures.evaluates_once(self._inner):
                self._closure = closure
                return None  # `_end_count` knows it
            self._loss = closures.evaluated(closure)
        return self._samples.of_step()

    def _end_count(self, count: int | None) -> int | None:
        """Returns the step's number of samples, given what `_begin_step` returned; after `_step_inner`."""
        return count if self._closure is None else self._samples.of_step()

    def _last_evaluation(self) -> Any:
        assert self._closure is not None
        self._samples.forget()
        return self._closure()

    def _step_inner(self, closure: Closure | None = None) -> Any:
        """Takes the inner optimiser's step, in which an optimiser of several evaluations evaluates the closure."""
        if self._closure is None:
            return super()._step_inner(closure)
        self._loss = super()._step_inner(self._last_evaluation)
        return self._loss

    def _end_step(self) -> Any:
        """Returns the closure's loss, or None."""
        loss, self._loss, self._closure = self._loss, None, None
        return loss

    def _refuse_several_evaluations(self, why: str) -> None:
        if self._closure is not None:
            raise ArgumentError(
                f"step: a {type(self._inner).__name__} may evaluate its closure several times, and {why}: take the "
                "backward out of the closure, or use an optimizer of torch.optim"
            )
