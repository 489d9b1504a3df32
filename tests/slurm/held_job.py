"""A job for `mpidl train` that can be stopped at a step known beforehand: at its tenth loss a rank waits for a file.

MPIDL_TEST_HELD names a folder: each rank writes `held.<rank>` there and waits for `go`, and should it be asked to stop
meanwhile, it writes `asked.<rank>`. Unset, or once `go` is there, the job just trains. Moments, dropout and BatchNorm
make a lost or repeated step show.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from mpidl.mpi import exit_protocol

_calls = itertools.count(1)


def model():
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
    )


def data(train):
    x = torch.linspace(-1, 1, 4 * (64 if train else 8)).reshape(-1, 4)
    return TensorDataset(x, x.sum(1))


def optimizer(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def loss(model, batch):
    if model.training and next(_calls) == 10 and "MPIDL_TEST_HELD" in os.environ:
        _hold(Path(os.environ["MPIDL_TEST_HELD"]))
    x, y = batch
    return ((model(x)[:, 0] - y) ** 2).mean()


def _hold(folder):
    rank = os.environ["SLURM_PROCID"]
    (folder / f"held.{rank}").touch()
    while not (folder / "go").exists():
        if exit_protocol.asked_to_stop():
            (folder / f"asked.{rank}").touch()
        time.sleep(0.05)
