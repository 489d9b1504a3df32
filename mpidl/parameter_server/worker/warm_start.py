"""A warm start: one worker trains alone for some steps, the others wait with their first forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpidl.mpi.waiting import Backoff
from mpidl.optim import models
from mpidl.optim.module_calls import ModuleCalls
from mpidl.parameter_server.center.clock import Clock


class WarmStart:
    """One worker's part in a warm start.

    Args:
        steps: that the leader takes before the other workers begin; 0: there is no warm start.
        model: on a worker that waits, its first forward with gradients does.
        clock: has the counter that ends it.
        look: called while this worker waits; raises if a rank has died.
        pull: makes the local parameters the center, when the warm start is over.
        leads: whether this worker is the leader, which trains alone.
    """

    def __init__(
        self,
        steps: int,
        model: torch.nn.Module,
        clock: Clock,
        look: Callable[[], None],
        pull: Callable[[], Any],
        *,
        leads: bool,
    ) -> None:
        self._clock, self._look, self._pull = clock, look, pull
        self._left = steps if leads else 0
        self._waits = steps > 0 and not leads
        called = models.called(model) if self._waits else []
        self._calls = [ModuleCalls(module, before=self._before_forward) for module in called]

    @property
    def leading(self) -> bool:
        """Whether this worker trains alone now."""
        return self._left > 0

    def step(self) -> None:
        """Counts a step of the leader; lets the others begin after the last one."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._clock.end_warm_start()

    def join(self) -> None:
        """Returns when the warm start is over; a worker that waited begins from the center."""
        if not self._waits:
            return
        backoff = Backoff()
        while not self._clock.warm():
            backoff.pause()
            self._look()
        self._stop_waiting()
        self._pull()

    def end(self) -> None:
        """Ends the warm start early, on this worker; the leader lets the others begin."""
        self._stop_waiting()
        if self._left:
            self._left = 0
            self._clock.end_warm_start()

    def _stop_waiting(self) -> None:
        self._waits = False
        for calls in self._calls:
            calls.remove()
        self._calls.clear()

    def _before_forward(self) -> None:
        if torch.is_grad_enabled():
            self.join()
