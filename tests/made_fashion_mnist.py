"""A small data set in the format of Fashion-MNIST, made for tests: the class of a picture is the row that is lit."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

SIDE = 28


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Returns unsigned bytes as an IDX file has them."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, counts: dict[str, int]) -> None:
    """Writes the four files; `counts`: samples of 'train' and 't10k'."""
    for part, count in counts.items():
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        images = np.random.default_rng(count).integers(0, 60, (count, SIDE, SIDE)).astype(np.uint8)
        images[np.arange(count), 4 + 2 * labels] += 150
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
