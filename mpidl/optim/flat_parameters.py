"""A distributed optimiser that reads and writes its parameters as one flat array."""

from __future__ import annotations

import numpy as np
import torch

from mpidl.optim import flat
from mpidl.optim.flat import Flat
from mpidl.optim.optimizer import DistributedOptimizer


class FlatParameters(DistributedOptimizer):
    """Adds flat arrays of the trained parameters; a subclass calls `_lay_out` once, after this constructor."""

    def _lay_out(self) -> None:
        self._orders = flat.orders_of(self._held)
        self._layout = flat.layout_of(self._held, self._orders)
        self._memory = flat.Memory(self._layout)

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
