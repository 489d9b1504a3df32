"""The smallest job in which a lost step shows: `mpidl train tiny_job.py`. MPIDL_TEST_STEP is the delay of a step."""

from __future__ import annotations

import os
import time

import torch
from torch.utils.data import TensorDataset

calls: list[bool] = []


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
    x, y = batch
    calls.append(model.training)
    if model.training and len(calls) > 1:  # the first is a trial before training
        time.sleep(float(os.environ.get("MPIDL_TEST_STEP", "0")))
    return ((model(x)[:, 0] - y) ** 2).mean()
