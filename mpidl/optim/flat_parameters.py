"""An optimiser whose parameters can be seen as one flat array; what is done with it is in `parameter_server.worker`."""

from __future__ import annotations

import numpy as np
import torch

from mpidl.optim import flat
from mpidl.optim.flat import Flat
from mpidl.optim.optimizer import DistributedOptimizer


class FlatParameters(DistributedOptimizer):
    """Adds the flat view of the parameters, `_lay_out` having been called once."""

    def _lay_out(self) -> None:
        self._orders = flat.orders_of(self._held)
        self._layout = flat.layout_of(self._held, self._orders)
        self._memory = flat.Memory(self._layout)

    def named(self, center: Flat) -> dict[str, torch.Tensor]:
        """Returns the parts of a flat center by parameter name, in the parameters' dtypes, on their device.

        Args:
            center: as `snapshot` gave it.
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
        """Returns a copy from which parameters can be unpacked."""
        copied = self._new()
        copied[:] = saved
        return copied

    def _take(self) -> Flat:
        """Returns memory with anything in it, to be given back."""
        return self._memory.take(self._views()[0])

    def _give_back(self, *unused: Flat) -> None:
        self._memory.give_back(self._views()[0], *unused)

    def _flat(self) -> Flat:
        return flat.pack(self._layout, self._views(), self._take())

    def _views(self) -> list[torch.Tensor]:
        return flat.views(self._held, self._orders)
