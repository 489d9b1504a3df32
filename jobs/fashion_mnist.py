"""A job for `mpidl train`: Fashion-MNIST, 60,000 + 10,000 grey pictures of clothes, 28 x 28 pixels, ten classes.

    apt-get install dataset-fashion-mnist        # or --data FOLDER with the four .gz files of that name
    mpidl run -n 2 -- mpidl train jobs/fashion_mnist.py --epochs 6 --batch-size 32
    mpidl run -n 4 -- mpidl train jobs/fashion_mnist.py --epochs 6 --batch-size 32 --algorithm agn
    mpidl run -n 2 -- mpidl train jobs/fashion_mnist.py --epochs 6 --batch-size 32 -- --network mlp

The data: H. Xiao et al., *Fashion-MNIST*, 2017. The networks: a small convolutional one, and the multilayer perceptron
784-1000-2000-1000-10 with which J. Hermans' thesis (2017) compares its algorithms, there on MNIST.
"""

from __future__ import annotations

import argparse
import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import mpidl
import mpidl.cli

options = argparse.Namespace()  # replaced by `mpidl train`: what add_options() declares, parsed

DEBIAN = "/usr/share/datasets/fashion-mnist"
CLASSES, SIDE = 10, 28
UNSIGNED_BYTES = 0x08  # the only element type that these files have
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels, between 0 and 1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default=DEBIAN, help="folder with the four .gz files [default: %(default)s]")
    parser.add_argument("--network", choices=["cnn", "mlp"], default="cnn", help="[default: %(default)s]")
    parser.add_argument("--lr", type=float, default=0.04, help="learning rate of SGD at first [default: %(default)s]")
    parser.add_argument("--decay", type=float, default=0.9997, help="of the lr, each step [default: %(default)s]")
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD [default: %(default)s]")
    parser.add_argument("--limit", type=int, help="take the first LIMIT pictures of each file only, for a try")


def model() -> nn.Module:
    if options.network == "mlp":
        sizes = (SIDE * SIDE, 1000, 2000, 1000)
        hidden = [layer for i in range(3) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], CLASSES))
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def data(train: bool) -> TensorDataset:
    folder, part = Path(options.data), "train" if train else "t10k"
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", (SIDE, SIDE), options.limit)
    labels_file = folder / f"{part}-labels-idx1-ubyte.gz"
    labels = read_idx(labels_file, (), options.limit)
    if len(images) != len(labels):
        raise mpidl.ArgumentError(f"{labels_file} has {len(labels)} labels for {len(images)} images")
    if len(labels) and int(labels.max()) >= CLASSES:
        raise mpidl.ArgumentError(f"{labels_file} has the label {int(labels.max())}; expected 0 to {CLASSES - 1}")
    pixels = (images.unsqueeze(1).float() / 255 - MEAN) / DEVIATION
    return TensorDataset(pixels, labels.long())


def read_idx(file: Path, shape: tuple[int, ...], limit: int | None = None) -> torch.Tensor:
    """Returns the first `limit` (default: all) items of a compressed IDX file of unsigned bytes.

    The format: two zero bytes, the element type, the number of dimensions; each dimension as four bytes, the highest
    first, the number of items being the first of them; then the elements.

    Args:
        file: ends in .gz.
        shape: of one item, as it must be.

    Returns:
        uint8, shape (items, *shape).

    Raises:
        mpidl.ArgumentError: the file is not there, is damaged, or holds something else.
    """
    if limit is not None and limit < 1:
        raise mpidl.ArgumentError(f"--limit {limit}: expected 1 or more")
    expected = (UNSIGNED_BYTES, 1 + len(shape))
    try:
        with gzip.open(file) as stream:
            header = stream.read(4 + 4 * (1 + len(shape)))
            found = (header[2], header[3]) if len(header) >= 4 else ()
            if len(header) < 4 + 4 * (1 + len(shape)) or header[:2] != b"\0\0" or found != expected:
                raise mpidl.ArgumentError(f"{file} is no IDX file of unsigned bytes in {expected[1]} dimension(s)")
            count, *item = (int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4))
            if tuple(item) != shape:
                raise mpidl.ArgumentError(f"{file} has items of shape {tuple(item)}; expected {shape}")
            wanted = count * math.prod(shape)
            content = stream.read(wanted + 1)  # one more than there may be; to the end, for the checksum
    except FileNotFoundError as error:
        advice = "apt-get install dataset-fashion-mnist, or -- --data FOLDER"
        raise mpidl.ArgumentError(f"{file} is not there: {advice}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise mpidl.ArgumentError(f"{file} cannot be read, or is damaged: {error}") from error
    if len(content) != wanted:
        raise mpidl.ArgumentError(f"{file} announces {count} items and holds {'more' if content[wanted:] else 'fewer'}")
    kept = count if limit is None else min(limit, count)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(count, *shape)[:kept]


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    made = torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum)
    made.register_step_post_hook(_decay)
    return made


def _decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Lowers the learning rate where the optimiser keeps it, so that its state says how far it has come."""
    for group in optimizer.param_groups:
        group["lr"] *= options.decay


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def accuracy(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return (model(images).argmax(dim=1) == labels).float().mean()


if __name__ == "__main__":
    mpidl.cli.run_job(__file__)
