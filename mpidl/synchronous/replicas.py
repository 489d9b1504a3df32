"""Part of `Synchronous`: its replicas compared, and ranks that took fewer steps made alike at the end."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from mpidl.errors import MismatchError
from mpidl.optim import state, transport, verify
from mpidl.optim.buffers import describe_difference
from mpidl.optim.optimizer import DistributedOptimizer
from mpidl.synchronous.reduction.header import VERIFYING, Header
from mpidl.synchronous.reduction.reducer import Reducer
from mpidl.synchronous.sharded.step import Sharded


class Replicas(DistributedOptimizer):
    """A distributed optimiser under which all ranks hold equal parameters after each step."""

    _steps_apart: ClassVar[bool] = False

    _reducer: Reducer
    _sharded: Sharded | None

    def verify(self) -> None:  # the docstring is the base's
        if self._finished:
            super().verify()
            return
        self._reducer.check_whole("verify")
        self._compare(self._reducer.announce(VERIFYING))

    verify.__doc__ = DistributedOptimizer.verify.__doc__

    def _compare(self, header: Header) -> None:
        error = describe_difference(self._ranks, self._trained(), "verify")
        if error is None:
            stepping = [rank for rank in range(self._ranks.size) if rank not in header.finished]
            error = verify.find_difference(self._ranks, self._parameters(), "verify", stepping)
        if error is not None:
            raise error

    def _parameters(self) -> dict[str, torch.Tensor]:
        """Returns the parameters that are equal on all ranks; a collective."""
        return self._trained() | (self._untrained(self._ranks) if self._buffers == "mean" else {})

    def _answer(self, header: Header) -> None:
        """Does this rank's part of what the other ranks do, while this rank is in `finish()`."""
        if header.doing == VERIFYING:
            self._compare(header)
        elif self._sharded is not None:
            self._sharded.answer(header)

    def _level(self) -> MismatchError | None:
        """Copies the state of a rank that took all steps to the ranks that took fewer; a collective."""
        ranks, newest = self._ranks, self._reducer.uneven
        if newest is None:
            return None
        steps = ranks.gather_words(np.array([self.statistics.steps], np.int64), "finish")[:, 0]
        error = verify.find_difference(
            ranks, self._parameters(), "finish", np.flatnonzero(steps == steps[newest]).tolist()
        )
        parameters = list(self._parameters().values() if self._sharded is None else self._untrained(ranks).values())
        if self._sharded is None and self._buffers == "mean":
            parameters += self._model_state.buffers().values()
        dense = [one for one in parameters if not transport.is_sparse(one)]
        transport.broadcast(ranks, dense, newest, "finish")
        if self._sharded is None:
            state.broadcast_optimizer(ranks, self._inner, newest)
        return error
