"""jobs/fashion_mnist.py: what it reads from IDX files, and which files it refuses by name. No MPI."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import made_fashion_mnist as made
import numpy as np
import pytest
import torch

from mpidl.errors import ArgumentError
from mpidl.training import job as jobs

JOB = Path(__file__).parents[2] / "jobs" / "fashion_mnist.py"
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made.write(tmp_path, {"train": 30, "t10k": 20})
    return tmp_path


def load(folder: Path, *options: str) -> jobs.Job:
    return jobs.load(JOB, ["--data", str(folder), *options])


def test_pictures_and_labels_are_read(folder: Path) -> None:
    job = load(folder)
    train, held_out = job.dataset(True), job.dataset(False)
    assert (len(train), len(held_out)) == (30, 20)
    images, labels = train[:]
    assert (images.shape, images.dtype) == ((30, 1, 28, 28), torch.float32)
    assert labels.tolist() == [n * 7 % 10 for n in range(30)]
    raw = np.frombuffer(gzip.decompress((folder / IMAGES).read_bytes())[16:], np.uint8).reshape(30, 28, 28)
    assert torch.allclose(images[:, 0], (torch.from_numpy(raw.copy()) / 255 - 0.2860) / 0.3530)
    lit = images[:, 0].mean(2).argmax(1)
    assert torch.equal(lit, 4 + 2 * labels)  # pictures and labels stay together, upright


def test_limit_takes_the_first(folder: Path) -> None:
    train, held_out = (load(folder, "--limit", "25").dataset(train) for train in (True, False))
    assert (len(train), len(held_out)) == (25, 20)
    assert torch.equal(train[3][0], load(folder).dataset(True)[3][0])
    with pytest.raises(ArgumentError, match="--limit 0"):
        load(folder, "--limit", "0").dataset(True)


@pytest.mark.parametrize(("network", "shapes"), [("cnn", None), ("mlp", [(1000, 784), (2000, 1000), (1000, 2000)])])
def test_both_networks_take_a_batch(folder: Path, network: str, shapes: list[tuple[int, int]] | None) -> None:
    job = load(folder, "--network", network)
    model = job.new_model()
    batch = list(job.dataset(True)[:8])
    assert model(batch[0]).shape == (8, 10)
    job.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    if shapes:
        assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [*shapes, (10, 1000)]


def test_the_learning_rate_decays_where_the_optimiser_keeps_it(folder: Path) -> None:
    job = load(folder, "--lr", "0.5", "--decay", "0.5")
    model = job.new_model()
    optimizer = job.new_optimizer(model.parameters())
    for expected in (0.25, 0.125):
        job.loss(model, list(job.dataset(True)[:4])).backward()
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][0]["lr"] == expected


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Returns what changes a file's content before compression."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(gzip.compress(change(gzip.decompress((folder / name).read_bytes()))))

    return damage


def compressed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Returns what changes a file's compressed bytes."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


DAMAGES = {
    "absent": (lambda folder: (folder / LABELS).unlink(), LABELS, "apt-get install dataset-fashion-mnist"),
    "plain": (compressed(IMAGES, gzip.decompress), IMAGES, "damaged"),
    "cut off": (compressed(IMAGES, lambda content: content[:-100]), IMAGES, "damaged"),
    "wrong checksum": (
        compressed(IMAGES, lambda content: content[:-8] + bytes(4) + content[-4:]),
        IMAGES,
        "damaged",
    ),
    "a flipped bit": (
        compressed(IMAGES, lambda content: content[:900] + bytes([content[900] ^ 4]) + content[901:]),
        IMAGES,
        "damaged|announces",
    ),
    "empty": (rewritten(LABELS, lambda content: b""), LABELS, "no IDX file"),
    "half a header": (rewritten(IMAGES, lambda content: content[:9]), IMAGES, "no IDX file"),
    "something else": (rewritten(LABELS, lambda content: b"label,pixel1,pixel2"), LABELS, "no IDX file"),
    "floats": (rewritten(IMAGES, lambda content: b"\0\0\x0d\x03" + content[4:]), IMAGES, "unsigned bytes"),
    "exchanged": (
        lambda folder: (folder / LABELS).write_bytes((folder / IMAGES).read_bytes()),
        LABELS,
        "in 1 dimension",
    ),
    "another shape": (
        rewritten(IMAGES, lambda content: content[:8] + struct.pack(">II", 14, 56) + content[16:]),
        IMAGES,
        r"\(14, 56\); expected \(28, 28\)",
    ),
    "too short": (rewritten(IMAGES, lambda content: content[:-1]), IMAGES, "announces 30 items and holds fewer"),
    "too long": (rewritten(IMAGES, lambda content: content + b"\0"), IMAGES, "announces 30 items and holds more"),
    "a label too few": (
        rewritten(LABELS, lambda content: content[:7] + b"\x1d" + content[8:-1]),
        LABELS,
        "29 labels for 30 images",
    ),
    "a label too high": (rewritten(LABELS, lambda content: content[:-1] + b"\x0a"), LABELS, "the label 10"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_file_is_refused_by_name(folder: Path, name: str) -> None:
    damage, file, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(ArgumentError, match=words) as refused:
        load(folder).dataset(True)
    assert str(folder / file) in str(refused.value)
