"""A job for `mpidl train`: scikit-learn's bundled handwritten digits, 8 x 8 pixels, a small convolutional network.

    mpidl run -n 2 -- mpidl train jobs/digits.py
    mpidl run -n 4 -- mpidl train jobs/digits.py --algorithm agn

The same two by `python jobs/digits.py ...` instead of `mpidl train jobs/digits.py ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.data import TensorDataset

import mpidl.cli

options = argparse.Namespace()  # replaced by `mpidl train`: what add_options() declares, parsed

HELD_OUT_EVERY = 5  # every fifth sample is held out: 360 of 1,797


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lr", type=float, default=0.07, help="learning rate of SGD [default: %(default)s]")
    parser.add_argument("--momentum", type=float, default=0.5, help="of SGD [default: %(default)s]")
    parser.add_argument("--channels", type=int, default=16, help="of the convolutions [default: %(default)s]")


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, options.channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(options.channels, 2 * options.channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * options.channels * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def data(train: bool) -> TensorDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("jobs/digits.py needs scikit-learn for its digits: pip install 'mpidl[jobs]'") from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels are 0 to 16
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == 0
    chosen = ~held_out if train else held_out
    return TensorDataset(images[chosen], labels[chosen])


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum)


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def accuracy(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return (model(images).argmax(dim=1) == labels).float().mean()


if __name__ == "__main__":
    mpidl.cli.run_job(__file__)
