"""ADAG, asynchronous distributed adaptive gradients (Hermans' thesis, chapter 4): staleness is a distance.

dist-keras calls this rule Experimental, and by the name ADAG the rule that is `AGN` in mpidl.
"""

from __future__ import annotations

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim import validation
from mpidl.optim.flat import Flat
from mpidl.parameter_server.worker.locked import ExclusiveWorker


class ADAG(ExclusiveWorker):
    """Commits the local steps' moves, each element scaled by 1 / ((theta_t - theta_{t-tau})^2 / gamma + 1).

    theta_t is the element of the center at the commit, theta_{t-tau} what this worker last read of it: an element that
    nobody else has moved takes the whole commit. The center is read, and the scaled move added, in one step, as a
    server would (dist-keras under its mutex); it then has this worker's commit in it when the worker goes on from it.
    Source: J. Hermans, *On Scalable Deep Learning and Parallelizing Gradient Descent*, 2017, Eq. 4.1 and 4.7, by
    element as its code has it.

    Args:
        optimizer: takes the local steps; any.
        model, communication_window, max_clock_spread, comm, buffers: as `Worker`.
        gamma: squared distance at which half of a move is taken; the thesis finds no rule for it and uses 1e-4.

    Raises:
        As `Worker`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        communication_window: int = 5,
        gamma: float = 1e-4,
        max_clock_spread: int | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._gamma = gamma
        super().__init__(
            optimizer,
            model,
            communication_window=communication_window,
            max_clock_spread=max_clock_spread,
            comm=comm,
            buffers=buffers,
            error=validation.positive("gamma", gamma),
            hyperparameters={"gamma": gamma},
        )

    def _change(self, here: slice, reached: Flat, center: Flat) -> Flat:
        distance = center - self._start[here]
        if not distance.any():
            exact: Flat = reached[here].copy()  # start + (reached - start) would round
            return exact
        scale = 1 / (distance * distance / self._gamma + 1)
        changed: Flat = center + scale * (reached[here] - self._start[here])
        return changed
