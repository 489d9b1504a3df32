"""What rules share that must read and write the center in one step: they exchange shard by shard, under its lock."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from mpidl.optim.flat import Flat
from mpidl.parameter_server.center.center import Requirements
from mpidl.parameter_server.worker.base import Worker
from mpidl.parameter_server.worker.exchange import Exchange


class LockedWorker(Worker):
    """Base of rules whose commit depends on the center as it is at that very moment.

    A commit is one step for each shard, not for the center as a whole: between two shards other workers may commit.
    """

    _needs: ClassVar[Requirements] = Requirements(locks=True)

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

    def _contribution(self, *, overlapped: bool) -> Flat:
        reached = self._reached()
        with np.errstate(over="ignore", invalid="ignore"):  # `_commit` refuses what comes of it
            self._prepare(reached)
        return reached

    def _commit(self, exchange: Exchange[Flat]) -> None:
        reached = exchange.contribution
        if not np.isfinite(reached).all():
            exchange.refuse()
            return

        def change(here: slice, center: Flat) -> Flat:
            changed = self._change(here, reached, center)
            if np.isfinite(changed).all():
                return changed
            exchange.refuse()  # an overflow in the rule itself: this shard stays as it is
            return center

        with np.errstate(over="ignore", invalid="ignore"):
            exchange.change_shards(change)

    def _start_next(self, exchange: Exchange[Flat]) -> None:
        if exchange.number is None:  # refused as a whole
            super()._start_next(exchange)
            self._give_back(exchange.contribution)
        else:
            assert exchange.center is not None
            self._go_on(exchange.contribution, exchange.center)
