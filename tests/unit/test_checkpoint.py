"""The checkpoints' format: whole or refused by name, whatever is damaged and whenever the writer is killed. No MPI."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpidl.errors import ArgumentError
from mpidl.training import checkpoint as module
from mpidl.training.checkpoint import (
    Checkpoint,
    Draft,
    Store,
    check_encodable,
    decode,
    decode_tensors,
    encode,
    encode_tensors,
    open_checkpoint,
)
from mpidl.training.randomness import random_state, restore_random_state, seed_all, seed_for

FILES = ("manifest.json", "model.safetensors", "training.pt")


def write(store: Path, number: int, **content: Any) -> Path:
    draft = Draft(store, number)
    draft.create()
    entries = {
        "model.safetensors": draft.add("model.safetensors", encode_tensors({"w": torch.arange(3.0) + number})),
        "training.pt": draft.add("training.pt", encode({"number": number})),
    }
    draft.commit({"versions": {"mpidl": "9"}, **content}, entries)
    return store / f"{number:06d}"


def newest(store: Path) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return Store(store).newest(said.append), said


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 12, steps=7)
    found, said = newest(tmp_path)
    assert found is not None
    assert (found.number, found.manifest["steps"], said) == (12, 7, [])
    assert torch.equal(decode_tensors(found.read("model.safetensors"))["w"], torch.arange(3.0) + 12)
    assert decode(found.read("training.pt")) == {"number": 12}
    assert names(tmp_path) == ["000001", "000012"]
    assert names(found.path) == sorted(FILES)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "longer", "empty", "gone"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_used(tmp_path: Path, file: str, damage: str) -> None:
    write(tmp_path, 1)
    target = write(tmp_path, 2) / file
    raw = bytearray(target.read_bytes())
    if damage in ("first", "middle", "last"):
        place = {"first": 0, "middle": len(raw) // 2, "last": len(raw) - 3}[damage]
        raw[place] ^= 4
    target.write_bytes({"cut": raw[:-20], "longer": raw + b"x", "empty": b""}.get(damage, raw))
    if damage == "gone":
        target.unlink()
    found, said = newest(tmp_path)
    assert found is not None
    assert found.number == 1
    assert len(said) == 1
    assert str(target) in said[0]


def test_no_flipped_bit_of_a_manifest_goes_unseen(tmp_path: Path) -> None:
    path = write(tmp_path, 1, seconds=32.884959589319116)  # which is the same number as ...117
    raw = (path / "manifest.json").read_bytes()
    for place in range(len(raw)):
        flipped = bytearray(raw)
        flipped[place] ^= 1
        (path / "manifest.json").write_bytes(flipped)
        with pytest.raises(ArgumentError, match=r"manifest\.json"):
            newest(tmp_path)


def test_where_none_is_whole_all_are_named(tmp_path: Path) -> None:
    for number in (1, 2):
        (write(tmp_path, number) / "training.pt").unlink()
    with pytest.raises(ArgumentError, match=r"(?s)no checkpoint in .* is whole: .*000002/training.pt.*000001/training"):
        newest(tmp_path)
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_later_format_is_refused_and_no_older_checkpoint_taken_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(module, "FORMAT", 2)
    write(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match=r"000002 has format 2, written by mpidl 9; this version reads format 1"):
        newest(tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for number in range(1, 6):
        write(tmp_path, number)
    Store(tmp_path).keep(keep)
    assert Store(tmp_path).numbers() == left
    assert len(names(tmp_path)) == len(left)


def test_damaged_ones_are_set_aside_and_unfinished_ones_removed(tmp_path: Path) -> None:
    for number in (3, 4):
        write(tmp_path, number)
    Draft(tmp_path, 5).create()
    (tmp_path / ".000001.old").mkdir()
    said: list[str] = []
    assert Store(tmp_path).next_number() == 6
    Store(tmp_path).set_aside(3, said.append)
    assert names(tmp_path) == ["000003", "000004.aside"]
    assert len(said) == 1
    assert ".000005.part was never finished" in said[0]
    assert Store(tmp_path).next_number() == 5  # no number comes twice
    Store(tmp_path).keep(1)
    assert names(tmp_path) == ["000003", "000004.aside"]


def test_a_file_that_another_rank_wrote_elsewhere_is_missed(tmp_path: Path) -> None:
    draft = Draft(tmp_path, 1)
    draft.create()
    entry = draft.add("rank.0.pt", b"content")
    with pytest.raises(OSError, match=r"rank.1.pt .* a folder that all nodes share"):
        draft.commit({}, {"rank.0.pt": entry, "rank.1.pt": entry})
    assert Store(tmp_path).numbers() == []


# A writer that dies at its n-th operation on the file system, for every n.
WRITER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import write
from mpidl.training.checkpoint import Store

store, left = Path(sys.argv[1]), [int(sys.argv[2])]
before = os.fsync

def step(event="", arguments=()):
    if event in ("", "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        if not event or str(store) in str(arguments) or event in ("os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

write(store, 1)
write(store, 2)
sys.addaudithook(step)
os.fsync = lambda descriptor: (step(), before(descriptor))
write(store, 3)
Store(store).keep(2)
print("ended", flush=True)
"""


def test_killed_at_any_moment_a_writer_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """One process forks for every moment, since importing torch takes longer than all of them."""
    script = WRITER.format(tests=str(Path(__file__).parent))
    program = f"""
import os, sys
import test_checkpoint
for n in range(1, 1000):
    pid = os.fork()
    if pid == 0:
        sys.argv = ["writer", f"{tmp_path}/{{n}}", str(n)]
        exec(compile({script!r}, "writer", "exec"), {{"__name__": "__main__"}})
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        print(n - 1)
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == {int(signal.SIGKILL)}, status
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    moments = int(result.stdout.split()[-1])
    assert moments > 15
    found = []
    for n in range(1, moments + 1):
        checkpoint, said = newest(tmp_path / str(n))
        assert said == []
        assert checkpoint is not None
        assert decode(checkpoint.read("training.pt")) == {"number": checkpoint.number}
        for number in Store(tmp_path / str(n)).numbers():
            open_checkpoint(tmp_path / str(n) / f"{number:06d}").check()
        found.append(checkpoint.number)
        Store(tmp_path / str(n)).set_aside(checkpoint.number, lambda text: None)
        assert all(name.isdigit() for name in names(tmp_path / str(n)))
    assert found == sorted(found)
    assert set(found) == {2, 3}


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit for the size of files stands in for the disk."""
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    draft = Draft(tmp_path, 2)
    draft.create()
    content = encode({"w": torch.zeros(10000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            draft.add("training.pt", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    draft.drop()
    assert names(tmp_path) == ["000001"]
    assert newest(tmp_path)[0] is not None


# ------------------------------------------------------------------------------------------------------- contents


def test_tensors_of_every_kind_survive(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    tensors = {
        "tied": weight,
        "tied too": weight,
        "part": weight[1:3, ::2],
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(3),
        "half": torch.randn(5).to(torch.bfloat16),
        "none": torch.zeros(0, 3, dtype=torch.float64),
        "trained": torch.randn(3, requires_grad=True),
    }
    found = decode_tensors(encode_tensors(tensors))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 4)], [2]
        ),
    ],
)
def test_torch_s_schedulers_can_be_saved(make: Any) -> None:
    scheduler = make(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    check_encodable("it", scheduler.state_dict())
    assert decode(encode(scheduler.state_dict())) == scheduler.state_dict()


class Factor:
    """A callable with state: torch's LambdaLR saves its dictionary."""

    def __init__(self) -> None:
        self.kept = Path("x")

    def __call__(self, epoch: int) -> float:
        return 1.0


def test_what_could_not_be_loaded_again_is_refused_before_it_is_saved() -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), Factor()
    )
    with pytest.raises(ArgumentError, match="the scheduler cannot be saved in a checkpoint"):
        check_encodable("the scheduler", scheduler.state_dict())


def test_random_numbers_go_on_where_they_were_saved() -> None:
    def draw() -> tuple[list[float], float, float, float]:
        return torch.randn(3).tolist(), float(np.random.rand()), float(np.random.randn()), random.gauss(0, 1)

    seed_all(5)
    draw()  # numpy and Python keep the second of two gaussian numbers for the next call
    state = decode(encode(random_state()))
    expected = [draw() for _ in range(3)]
    seed_all(6)
    restore_random_state(state)
    assert [draw() for _ in range(3)] == expected


def test_seeds_of_new_ranks_differ_and_are_the_same_each_time() -> None:
    seeds = Counter(seed_for(seed, rank, steps) for seed in (0, 1) for rank in range(20) for steps in (1, 2))
    assert max(seeds.values()) == 1
    assert seed_for(0, 3, 17) == seed_for(0, 3, 17)
    json.dumps(list(seeds))
