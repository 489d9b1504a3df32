"""ADAG, asynchronous distributed adaptive gradients (Hermans' thesis, chapter 4): staleness is a distance.

dist-keras calls this rule Experimental, and by the name ADAG the rule that is `AGN` in mpidl.
"""

from __future__ import annotations

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeInt, PositiveFloat, PositiveInt, given
from mpidl.parameter_server.worker.locked import LockedWorker


class ADAG(LockedWorker):
    """Commits the local steps' moves, each element scaled by 1 / ((theta_t - theta_{t-tau})^2 / gamma + 1).

    theta_t is the element of the center at the commit, theta_{t-tau} what this worker last read of it: an element that
    no other worker has moved takes the whole commit. The center is read, and the scaled move added, in one step, as a
    server would (dist-keras under its mutex); it then has this worker's commit in it when the worker goes on from it.
    Source: J. Hermans, *On Scalable Deep Learning and Parallelizing Gradient Descent*, 2017, Eq. 4.1 and 4.7, by
    element as its code has it.

    Args:
        optimizer: takes the local steps; any torch optimiser, holding parameters of `model` only. Its state stays with
            this worker.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            The center starts from them.
        communication_window: local steps per exchange, 1 or more; 5 by default.
        gamma: squared distance of an element at which half of its move is taken, above 0; 1e-4 by default, as in the
            thesis, which finds no rule for it.
        max_clock_spread: exchanges that a worker may be ahead of the slowest one (SSP); None, the default: any number.
        comm: the ranks that train together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean", the default, averages BatchNorm statistics and other floating buffers in `finish()`; "local"
            leaves them.

    Raises:
        ArgumentError: optimiser and model do not belong together, or an argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 5,
        gamma: PositiveFloat = 1e-4,
        max_clock_spread: NonNegativeInt | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        self._gamma = gamma
        super().__init__(optimizer, model, **given(locals()))

    def _change(self, here: slice, reached: Flat, center: Flat) -> Flat:
        distance = center - self._start[here]
        if not distance.any():
            exact: Flat = reached[here].copy()  # start + (reached - start) would round
            return exact
        scale = 1 / (distance * distance / self._gamma + 1)
        changed: Flat = center + scale * (reached[here] - self._start[here])
        return changed
