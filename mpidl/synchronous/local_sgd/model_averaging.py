"""Model averaging, also called local SGD: after each communication window all ranks' parameters become their mean."""

from __future__ import annotations

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeInt, PositiveInt, given
from mpidl.synchronous.local_sgd.periodic import Periodic


class ModelAveraging(Periodic):
    """Averages the parameters of all ranks after each communication window of local steps (local SGD).

    With plain SGD and `communication_window=1` this is synchronous SGD, up to rounding. With `warmup_steps` it is
    post-local SGD: the gradients of the first steps are averaged at every step.

    Ranks may differ in their number of batches: a rank in `finish()` takes part in the rounds of the other ranks, and
    the mean is that of the ranks that took steps since the last round. A rank whose parameters hold an infinity or a
    NaN is left out of the mean, counts the round in `statistics.nonfinite_rounds`, and goes on from the mean.

    Sources: J. Hermans, *On Scalable Deep Learning and Parallelizing Gradient Descent*, 2017, Eq. 2.2-2.3; T. Lin et
    al., *Don't Use Large Mini-Batches, Use Local SGD*, ICLR 2020.

    Args:
        optimizer: takes the local steps; any torch optimiser over parameters of `model` only. Its state stays with its
            rank.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
        communication_window: local steps between two averagings, 1 or more; 16 as in Lin et al.
        warmup_steps: number of first steps that average gradients instead, 0 or more.
        comm: communicator of the ranks that train together; default `mpidl.world()`.
        buffers: "mean": `finish()` averages BatchNorm statistics and other floating buffers over the ranks; "local":
            each rank keeps its own.

    Raises:
        ArgumentError: an argument cannot work, or optimiser and model do not belong together; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or the
            parameters lie on several devices.
        MismatchError: the ranks gave different models, hyperparameters or arguments.
    """

    _takes_writes = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 16,
        warmup_steps: NonNegativeInt = 0,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        super().__init__(optimizer, model, **given(locals()))

    def _next(self, mean: Flat) -> Flat:
        return mean

    def common_state(self) -> dict[str, Flat]:
        return {}
