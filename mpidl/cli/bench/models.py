"""The networks of `training`, and the tensors that `pack` packs: shapes as of well-known models, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Work:
    """What a trainer does in a step."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]  # of one sample
    classes: int
    batch: int  # samples per rank


class Block(nn.Module):
    """Two 3 x 3 convolutions and a way around them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(around, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + around)


def resnet18() -> nn.Module:
    """ResNet-18 for 1000 classes: 62 parameters, 11,689,512 elements, of the shapes that torchvision's has."""
    blocks: list[nn.Module] = []
    inputs = 64
    for outputs in (64, 128, 256, 512):
        blocks += [Block(inputs, outputs, 1 if outputs == inputs else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    stem = (nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mlp() -> nn.Module:
    """784-512-512-10: 669,706 elements, 2.7 MB."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


# Pictures of 32 x 32: one core computes a step in a time that is not long beside the exchange of 47 MB.
WORK = {"resnet18": Work(resnet18, (3, 32, 32), 1000, 32), "mlp": Work(mlp, (1, 28, 28), 10, 32)}


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Returns the shapes of ResNet-50's parameters: 161 tensors, 25,557,032 elements, from 64 to 2,359,296 each."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for kernel in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [kernel, kernel[:1], kernel[:1]]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def many_small_shapes(tensors: int) -> list[tuple[int, ...]]:
    """Returns shapes of 1 to 500 elements, 250 on average, in a mixed order."""
    return [(1 + (i * 7919) % 500,) for i in range(tensors)]
