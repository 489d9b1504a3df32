"""Optimisers with a train and an eval mode, between which parameters change places (Schedule-Free, Defazio 2024).

In eval mode such an optimiser gives the model averaged weights, which it computes from the weights that it trains and
from its own state. So that all ranks end with equal weights in either mode, `finish()` agrees on the weights in train
mode, then on the state, and puts all ranks into one mode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpidl.mpi.topology import Topology
from mpidl.optim import state, transport

_MODE = "train_mode"  # Schedule-Free's name, in its groups
_WHAT = "agreeing on the optimizer's mode"


class Mode:
    """The mode of one rank's optimiser while `finish()` runs; nothing happens where an optimiser has no modes.

    Args:
        optimizer: the user's.
        trained: the parameters that it trains.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: state.Named) -> None:
        self._inner: Any = optimizer
        self._trained = [parameter for _, parameter in trained]
        self._exists = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
        groups = optimizer.param_groups
        self._evaluating = self._exists and any(group.get(_MODE) is False for group in groups)

    def begin(self) -> None:
        """Puts the optimiser into train mode, in which weights are exchanged."""
        if self._evaluating:
            self._inner.train()

    def agree(self, ranks: Topology, steps: int, *, apart: bool) -> None:
        """Makes weights, state and mode alike on all ranks; a collective after the last exchange.

        All ranks end in eval mode if one of them was in eval mode.

        Args:
            ranks: of the optimiser.
            steps: how many steps this rank took.
            apart: whether ranks took local steps, so that each has a state of its own; the state becomes the mean, in
                which a rank weighs as much as its steps.

        Raises:
            DtypeError, MismatchError: the state holds what cannot be sent.
        """
        if not self._exists:
            return
        everyone = ranks.gather_words(np.array([steps, self._evaluating], np.int64), _WHAT)
        if apart:
            self._average_state(ranks, everyone[:, 0])
        evaluating = everyone[:, 1].astype(bool)
        if evaluating.any() and (apart or not evaluating.all()):
            # Going from one mode to the other and back rounds: the weights are those of a rank that stayed.
            rank = int(np.argmax(np.where(evaluating, -1, everyone[:, 0])))
            transport.broadcast(ranks, self._trained, rank, _WHAT)
        if evaluating.any():
            self._inner.eval()

    def _average_state(self, ranks: Topology, steps: np.ndarray[Any, Any]) -> None:
        own = {
            (place, key): value.clone()
            for place, parameter in enumerate(self._trained)
            for key, value in self._inner.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }
        state.broadcast_optimizer(ranks, self._inner, int(steps.argmax()))  # a rank without steps has no state
        for place, parameter in enumerate(self._trained):
            for key, value in self._inner.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and transport.is_mean(value):
                    mine = own.get((place, key))
                    if mine is not None and mine.shape == value.shape:
                        transport.write(value, mine)
                    transport.mean(ranks, value, steps.tolist(), _WHAT)
