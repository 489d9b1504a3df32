"""A job in which everything that a checkpoint must hold matters: momentum or moments, a scheduler, dropout, BatchNorm,
and augmentation by all three random generators. It notes what it saw: `seen` at each call of the loss, `drawn` samples.
"""

from __future__ import annotations

import argparse
import copy
import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset

options = argparse.Namespace()
made: list[torch.optim.Optimizer] = []  # one to try the scheduler on, one to train with
seen: list[tuple[dict, dict]] = []
drawn: list[int] = []


def add_options(parser):
    parser.add_argument("--sgd", action="store_true")
    parser.add_argument("--width", type=int, default=8)


class Noisy(Dataset):
    def __init__(self, train):
        self.train, self.count = train, 46 if train else 9

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if self.train:
            drawn.append(index)
        noise = torch.randn(4) + float(np.random.rand()) + random.random()
        return torch.arange(4.0) + index % 7 + 0.1 * noise, torch.tensor(float(index % 7))


def model():
    width = options.width
    first = [torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.3), torch.nn.ReLU()]
    return torch.nn.Sequential(*first, torch.nn.Linear(width, 1))


def loss(model, batch):
    x, y = batch
    if model.training and made:
        seen.append(copy.deepcopy((model.state_dict(), made[-1].state_dict())))
    return ((model(x)[:, 0] - y) ** 2).mean()


def data(train):
    return Noisy(train)


def optimizer(parameters):
    kind, given = (torch.optim.SGD, {"momentum": 0.9}) if options.sgd else (torch.optim.Adam, {})
    parts = list(parameters)
    groups = [{"params": parts[:1]}, {"params": parts[1:]}] if "NOISY_GROUPS" in os.environ else parts
    made.append(kind(groups, lr=0.01, **given))
    return made[-1]


def scheduler(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
