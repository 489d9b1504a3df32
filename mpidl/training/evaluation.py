"""Held-out loss and accuracy, shared over the ranks: every sample counts once, however many ranks there are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.training.data import held_out_batches
from mpidl.training.job import Job


@dataclass(frozen=True)
class HeldOut:
    """Means over the held-out samples of all ranks."""

    loss: float
    accuracy: float | None  # None if the job has no accuracy()
    samples: int


def evaluate(
    job: Job, model: torch.nn.Module, dataset: Any, comm: Communicator, batch_size: int, *, limit: float | None = None
) -> HeldOut | None:
    """Returns the held-out figures, the same on every rank; a collective.

    The model is in evaluation mode meanwhile. A mean of batch means is weighted by the batches' counts.

    Args:
        limit: seconds after which a rank gives up; then all ranks return None.
    """
    sums, began = np.zeros(4), time.monotonic()
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch, count in held_out_batches(dataset, comm.rank, comm.size, batch_size):
            if limit is not None and time.monotonic() - began > limit:
                sums[3] = 1
                break
            accuracy = float(job.accuracy(model, batch)) if job.accuracy is not None else 0.0
            sums[:3] += (float(job.loss(model, batch)) * count, accuracy * count, count)
    model.train(was_training)
    loss, accuracy, samples, given_up = (float(x) for x in comm.allreduce(sums))
    if given_up:
        return None
    return HeldOut(loss / samples, accuracy / samples if job.accuracy is not None else None, int(samples))
