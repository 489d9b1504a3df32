"""The files of a run and what is shown meanwhile: whole or absent, never silently replaced. No MPI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mpidl.errors import ArgumentError
from mpidl.training.data import held_out_batches, training_share
from mpidl.training.outputs import Folder
from mpidl.training.progress import Bar, Figures, Lines, new_progress


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class Unsaveable:
    """Fails half-way through being saved."""

    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("planted")


def test_a_checkpoint_loads_with_weights_only_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    folder.prepare(overwrite=False)
    folder.write_checkpoint({"model": {"w": torch.arange(3.0)}, "epochs": 2, "algorithm": "agn"})
    loaded = torch.load(folder.path / "checkpoint.pt", weights_only=True)
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert loaded["epochs"] == 2
    assert names(folder.path) == ["checkpoint.pt"]


def test_a_checkpoint_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_checkpoint({"epochs": 1})
    with pytest.raises(RuntimeError, match="planted"):
        folder.write_checkpoint({"big": torch.zeros(10000), "bad": Unsaveable()})
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == {"epochs": 1}
    assert names(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("name", ["summary.json", "checkpoint.pt", "metrics.jsonl", "metrics.3.jsonl"])
def test_outputs_of_an_earlier_run_are_refused_and_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=rf"(?s){name}.*--overwrite"):
        Folder(tmp_path).prepare(overwrite=False)
    assert (tmp_path / name).read_text() == "old"
    Folder(tmp_path).prepare(overwrite=True)
    assert names(tmp_path) == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match="--output"):
            Folder(path).prepare(overwrite=True)


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    metrics = Folder(tmp_path).metrics(rank=2)
    metrics.write({"loss": 0.5})
    assert json.loads((tmp_path / "metrics.2.jsonl").read_text()) == {"loss": 0.5}
    metrics.close()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_held_out_samples_are_each_in_one_rank_s_part_once(size: int) -> None:
    seen: list[int] = []
    for rank in range(size):
        for batch, count in held_out_batches(torch.arange(10), rank, size, batch_size=2):
            assert len(batch) == count
            seen += batch.tolist()
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_training_shares_cover_the_data_in_equally_many_steps_with_true_counts(size: int) -> None:
    shares = [training_share(torch.arange(10), rank, size, 2, seed=1) for rank in range(size)]  # type: ignore[arg-type]
    for epoch in (0, 1):
        batches = [list(share.epoch(epoch)) for share in shares]
        assert {len(one) for one in batches} == {shares[0].steps}
        assert all(len(batch) == count for one in batches for batch, count in one)
        assert {int(i) for one in batches for batch, _ in one for i in batch} == set(range(10))
    first, second = ([batch.tolist() for batch, _ in shares[0].epoch(epoch)] for epoch in (0, 1))
    assert first != second


def test_lines_come_at_the_end_of_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    progress = new_progress("digits", epochs=2, steps=3, terminal_columns=None)
    assert isinstance(progress, Lines)  # pytest's standard error is no terminal
    for epoch in range(2):
        for step in (1, 2, 3):
            progress.update(epoch, step, Figures(0.25, 100.0, 1.5))
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"digits: epoch {e}/2  step 3/3  loss 0.2500  100 samples/s  staleness 1.50" for e in (1, 2)]


def test_a_bar_is_drawn_behind_a_pipe_if_a_terminal_stands_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = new_progress("digits", epochs=1, steps=2, terminal_columns=100)
    assert isinstance(progress, Bar)
    progress.update(0, 2, Figures(0.25, 100.0))
    progress.close()
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "loss 0.2500" in shown
