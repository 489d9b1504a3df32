"""Model averaging, also called local SGD: now and then all ranks' parameters become their mean."""

from __future__ import annotations

import torch

from mpidl.collectives.communicator import Communicator
from mpidl.optim.flat import Flat
from mpidl.optim.validation import NonNegativeInt, PositiveInt, given
from mpidl.synchronous.local_sgd.periodic import Periodic


class ModelAveraging(Periodic):
    """After each communication window the parameters of all ranks become their mean.

    With plain SGD and `communication_window=1` this is synchronous SGD, up to rounding. With `warmup_steps` it is
    post-local SGD: first the gradients are averaged at every step. Sources: J. Hermans, *On Scalable Deep Learning and
    Parallelizing Gradient Descent*, 2017, Eq. 2.2-2.3; T. Lin et al., *Don't Use Large Mini-Batches, Use Local SGD*,
    ICLR 2020.

    Args:
        optimizer, model, comm, buffers: as `Periodic`.
        communication_window: local steps per averaging; 16 as in Lin et al.
        warmup_steps: so many first steps are those of synchronous SGD.

    Raises:
        As `Periodic`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
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
