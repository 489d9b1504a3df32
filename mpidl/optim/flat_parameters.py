"""A distributed optimiser that reads and writes its parameters as one flat array."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch

from mpidl.optim import flat
from mpidl.optim.flat import Flat
from mpidl.optim.modes import Mode
from mpidl.optim.optimizer import DistributedOptimizer
from mpidl.optim.written import WriteCheck

_MODES = ("train", "eval")  # methods of optimisers that have two sets of weights (Schedule-Free): they write parameters


class FlatParameters(DistributedOptimizer):
    """Adds flat arrays of the trained parameters; a subclass calls `_lay_out` once, after this constructor."""

    def _lay_out(self) -> None:
        self._orders = flat.orders_of(self._held)
        self._layout = flat.layout_of(self._held, self._orders)
        self._memory = flat.Memory(self._layout)
        self._writes = WriteCheck(type(self).__name__, self._inner, self._model, self._held)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self._noting(found) if name in _MODES and callable(found) else found

    def _noting(self, method: Any) -> Any:
        """Returns a method of the inner optimiser, whose writes are the optimiser's own and no one else's."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._finished:
                return method(*args, **kwargs)
            self._refuse_written()
            result = method(*args, **kwargs)
            self._writes.note()
            return result

        return noted

    def _begin_mode(self, mode: Mode) -> None:
        written = self._writes.check()
        super()._begin_mode(mode)
        if not written:  # else the next check finds it again
            self._writes.note()

    def broadcast_parameters(self) -> None:
        """Makes all ranks, and the center, start anew from rank 0's parameters and buffers; a collective.

        Call it on every rank after weights were written outside a step: by `load_state_dict`, by a reset, by an average
        that is kept. Local steps since the last exchange are given up. What optimisers have gathered is kept: momenta
        and moments, those that a rule keeps by itself, the outer momentum of `DiLoCo`, and the sums of `DistBelief`.

        Raises:
            ArgumentError: a parameter has another shape or dtype than the optimiser was given, or was replaced.
            ClosedError: `finish()` was called.
            MismatchError: shapes or dtypes differ between ranks, or another rank refused.
        """
        self._refuse_closed("broadcast_parameters")
        self._give_up_steps()
        number = self._writes.changed()
        self._broadcast_model(self._writes.describe_error(number) if number else None)
        self._start_anew(self._flat())
        self._writes.note()
        self._ranks.barrier("broadcast_parameters")  # no rank may exchange before all have come so far

    @abstractmethod
    def _give_up_steps(self) -> None:
        """Ends what is under way, and forgets the local steps since the last exchange; no collective."""

    @abstractmethod
    def _start_anew(self, values: Flat) -> None:
        """Begins from these values, alike on all ranks; a collective, for which all ranks have come.

        Args:
            values: what the parameters are, flat, in memory that the caller does not use any more.
        """

    def _refuse_written(self) -> None:
        """Refuses parameters that something else has written or changed.

        Raises:
            ArgumentError: see `WriteCheck`.
        """
        number = self._writes.check()
        if number:
            raise self._writes.describe_error(number)

    def named(self, center: Flat) -> dict[str, torch.Tensor]:
        """Returns copies of the parts of a flat array by parameter name, in the parameters' dtypes, on their device.

        Args:
            center: a flat array from `snapshot` or `_like`.
        """
        dense = [torch.empty_like(view, memory_format=torch.contiguous_format) for view in self._views()]
        flat.unpack(self._layout, center, dense)
        return {
            name: one.permute(tuple(np.argsort(order))).clone()
            for (name, _), one, order in zip(self._held, dense, self._orders, strict=True)
        }

    def _new(self) -> Flat:
        return flat.new(self._layout, self._views()[0])

    def _like(self, saved: Flat) -> Flat:
        """Returns a copy from which parameters can be unpacked, on a device too."""
        copied = self._new()
        copied[:] = saved
        return copied

    def _take(self) -> Flat:
        """Returns memory with arbitrary content; `_give_back` takes the memory again."""
        return self._memory.take(self._views()[0])

    def _give_back(self, *unused: Flat) -> None:
        self._memory.give_back(self._views()[0], *unused)

    def _flat(self) -> Flat:
        """Returns the parameters' present values, flat, in memory from `_take`."""
        return flat.pack(self._layout, self._views(), self._take())

    def _views(self) -> list[torch.Tensor]:
        return flat.views(self._held, self._orders)
