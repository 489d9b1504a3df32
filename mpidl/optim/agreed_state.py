"""What the ranks agree on: all of a model's state at `finish()`, and what `verify()` compares before it."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakSet

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import DtypeError, MismatchError
from mpidl.mpi.topology import Topology
from mpidl.optim import state, verify
from mpidl.optim.buffers import ModelState, describe_difference
from mpidl.optim.modes import Mode

_open: WeakSet[AgreedState] = WeakSet()  # the optimisers whose `finish()` has not ended


class AgreedState:
    """Part of `DistributedOptimizer`, whose constructor sets the attributes."""

    _steps_apart: ClassVar[bool] = True  # ranks take local steps; False: all ranks take the same steps

    comm: Communicator
    statistics: Any
    _ranks: Topology
    _buffers: str
    _finished: bool
    _held: state.Named
    _model: torch.nn.Module
    _model_state: ModelState

    def _opened(self) -> None:
        _open.add(self)

    def _closed(self) -> None:
        _open.discard(self)

    def _agree_on_state(self, mode: Mode) -> MismatchError | DtypeError | None:
        """Makes all of the model's state alike on all ranks, after `_close`; a collective.

        Args:
            mode: of the optimiser, which `finish()` has put into train mode.

        Returns:
            An error about what could not be made alike.
        """
        ranks, mean, steps = self._ranks, self._buffers == "mean", self.statistics.steps
        untrained = self._untrained(ranks) if mean else {}
        buffers = self._model_state.buffers() if mean else {}
        error: MismatchError | DtypeError | None
        error = describe_difference(ranks, self._trained() | untrained | buffers, "finish")
        if error is not None:
            return error
        error = self._level()
        try:
            mode.agree(ranks, steps, apart=self._steps_apart)
        except (DtypeError, MismatchError) as found:
            error = error or found
        compared, averaged = (self._trained(), untrained) if self._steps_apart else (self._trained() | untrained, {})
        different = verify.find_difference(ranks, compared, "finish")
        return error or different or self._model_state.average(ranks, averaged | buffers, steps)

    def _level(self) -> MismatchError | None:
        """Makes ranks alike that took fewer steps than others; a collective within `finish()`."""
        return None

    def _trained(self) -> dict[str, torch.Tensor]:
        return {f"parameter {name}": p for name, p in self._held}

    def _untrained(self, ranks: Topology) -> dict[str, torch.Tensor]:
        """Returns the parameters that no optimiser of mpidl trains at present, on any rank; a collective."""
        there = self._trained_elsewhere(ranks)
        return {name: p for name, p in self._model_state.untrained().items() if name not in there}

    def _trained_elsewhere(self, ranks: Topology) -> frozenset[str]:
        """Returns the model's parameters that another optimiser of mpidl trains, on some rank; a collective."""
        trained = {id(p) for _, p in self._held}
        elsewhere = {id(p) for other in _open for _, p in other._held} - trained
        mine = {f"parameter {name}": True for name, p in self._model.named_parameters() if id(p) in elsewhere}
        return frozenset(state.differing(ranks, mine, "other optimizers")) | mine.keys()  # one may have been dropped

    def _average_buffers(self, ranks: Topology) -> None:
        """Makes buffers what `finish()` would make of them now; a collective."""
        tensors = self._model_state.buffers()
        error = describe_difference(ranks, tensors, "mean of the buffers")
        error = error or self._model_state.average(ranks, tensors, self.statistics.steps)
        if error is not None:
            raise error

    def verify(self) -> None:
        """Compares what all ranks must hold alike at this moment, bit for bit; a collective.

        After `finish()` that is all of the model's state, in every class. Before it:

        - `Synchronous`: all parameters, after each step. Ranks that are in `finish()` already are left out.
        - `ModelAveraging`, `DiLoCo`: the trained parameters where no rank has taken a step since the last round of
          averaging. Within a communication window parameters differ by design.
        - the asynchronous classes: names, shapes and dtypes of the parameters. The values differ by design until
          `finish()`.

        Raises:
            MismatchError: a tensor differs; alike on all ranks. The message has the first parameter that differs, on
                which ranks, and by how much.
        """
        ranks = self.comm.topology if self._finished else self._ranks
        tensors = self._trained()
        if self._finished and self._buffers == "mean":
            tensors |= self._untrained(ranks) | self._model_state.buffers()
        error = describe_difference(ranks, tensors, "verify")
        if error is None and (self._finished or self._alike_now()):
            error = verify.find_difference(ranks, tensors, "verify")
        if error is not None:
            raise error

    def _alike_now(self) -> bool:
        """Returns whether all ranks must hold equal trained parameters now, alike on all ranks; a collective."""
        return False
