"""The way of rules that must read and write the center in one step: they exchange shard by shard, under its lock."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from mpidl.optim.flat import Flat
from mpidl.parameter_server.center.center import Beside
from mpidl.parameter_server.worker.base import Worker


class ExclusiveWorker(Worker):
    """Base of rules whose commit depends on the center as it is at that very moment.

    A commit is one step for each shard, not for the center as a whole: between two shards others may commit.

    Args and errors as `Worker`.
    """

    _beside: ClassVar[Beside] = Beside(locks=True)

    def _reached(self) -> Flat:
        """Returns where the local steps have led, flat."""
        return self._flat()

    def _prepare(self, reached: Flat) -> None:
        """Computes what needs no center, before a lock is held."""

    @abstractmethod
    def _change(self, here: slice, reached: Flat, center: Flat) -> Flat:
        """Returns what a shard of the center becomes.

        Args:
            here: the shard's place in flat arrays.
            reached: as `_reached` gave it, whole.
            center: the shard's elements now.
        """

    def _go_on(self, reached: Flat, center: Flat) -> None:
        """Gives the local parameters what the next window starts from; `center` is what the exchange made of it."""
        self._start_from(center, given=True)
        self._give_back(reached)

    def _commit(self) -> None:
        reached = self._reached()
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            self._prepare(reached)
            if not np.isfinite(reached).all():
                self._refuse_commit()
                self._pull()
                return
            kept = True

            def change(here: slice, center: Flat) -> Flat:
                nonlocal kept
                changed = self._change(here, reached, center)
                if np.isfinite(changed).all():
                    return changed
                kept = False
                return center

            center = self._take()
            number, clock = self._server.exchange(change, center)
        if not kept:  # an overflow in the rule itself: those shards stayed as they were
            self._refuse_commit()
        self._count_commit(number - self._clock, 2 * center.nbytes)
        self._clock = clock
        self._go_on(reached, center)

    def _fetch(self) -> None:
        """Nothing: the exchange has read the center."""
