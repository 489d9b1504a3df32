"""What the delta rules share: they commit the local steps' moves, divided or scaled, then pull; the worker's main
thread does so and waits, or the executor's thread does while the next local steps are taken (`overlap`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim import flat
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeInt, PositiveInt, given
from mpidl.parameter_server.worker import overlap as overlapping
from mpidl.parameter_server.worker.base import Worker
from mpidl.parameter_server.worker.exchange import Exchange


@dataclass(frozen=True)
class Moves:
    """What the local steps of one window came to."""

    delta: Flat
    now: list[torch.Tensor]  # where they led; no thread changes it until the exchange has ended
    start: Flat  # where they began
    reached: Flat | None  # the memory of `now`, if local steps go on meanwhile
    exact: bool  # the delta is the whole move, in the model's own dtype


class DeltaWorker(Worker):
    """Base of rules that any torch optimiser serves: it takes the local steps, and the rule knows only their sum.

    With `overlap=k` the executor's thread commits and pulls while the main thread takes the next k local steps. After
    them the parameters move by what the center differed from the parameters when the exchange began. The gradients of
    these steps do not know of it: they are staler, by a whole round of the other workers, and are counted so. The
    parameters of a worker without others are the same, bit for bit, as with `overlap=0`, if the rule commits the sum.

    Args:
        overlap: local steps, at most `communication_window`. Needs an MPI with threads (THREAD_MULTIPLE).
        others: as `Worker`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 5,
        overlap: NonNegativeInt = 0,
        max_clock_spread: NonNegativeInt | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        super().__init__(optimizer, model, **given(locals()))

    def _describe(self) -> dict[str, Any]:
        overlap = self._hyperparameters["overlap"]
        overlapping.check(overlap, "communication_window", self._window_length, self._spread)
        return super()._describe()

    def _divisor(self, steps: int) -> int:
        """Returns what the sum of so many local steps' moves is divided by."""
        return 1

    def _scale(self, staleness: int) -> float:
        """Returns what a commit of this staleness is multiplied by; 1 for a staleness of 0."""
        return 1.0

    def _exchange_if_due(self) -> None:
        if self._overlap.due(self._steps):
            self._settle()
        if self._steps >= self._window_length:
            self._settle()
            self._exchange(overlapped=self._overlap.steps > 0)

    def _contribution(self, *, overlapped: bool) -> Moves | None:
        """Returns the moves; None if they hold an infinity or a NaN."""
        reached = self._flat() if overlapped else None
        now = self._views() if reached is None else flat.parts(self._layout, reached)
        delta, divisor = self._take(), self._divisor(self._steps)
        if not flat.moves(self._layout, now, self._start, delta, divisor):
            self._give_back(delta, *([] if reached is None else [reached]))
            return None
        exact = divisor == 1 and flat.is_whole(self._layout, self._views())
        return Moves(delta, now, self._start, reached, exact)

    def _commit(self, exchange: Exchange[Moves | None]) -> None:
        moves, short = exchange.contribution, None
        if moves is None:
            exchange.refuse()
            return
        scale = self._scale(exchange.begin())
        # The center then still is `start`, and start + (now - start) is not `now` where a step is larger than what it
        # moves: what rounding leaves out is committed too, so that the center becomes `now` to the last bit.
        if moves.exact and scale == 1.0 and exchange.fresh:
            short = flat.rounding(self._layout, moves.now, moves.start, moves.delta, self._take())
        exchange.commit_and_pull(moves.delta, scale=scale, short=short)
        if short is not None:
            self._give_back(short.values)

    def _start_next(self, exchange: Exchange[Moves | None]) -> None:
        moves, center = exchange.contribution, exchange.center
        if moves is None or moves.reached is None:
            super()._start_next(exchange)
            self._give_back(*([] if moves is None else [moves.delta]))
            return
        assert center is not None
        views = self._views()
        if not flat.is_whole(self._layout, views):
            flat.round_like(self._layout, views, center)
        flat.shift(self._layout, views, moves.reached, center)
        self._start = center
        self._give_back(moves.delta, moves.start, moves.reached)
