"""The files of a run and what is shown meanwhile, apart from checkpoints: never silently replaced. No MPI."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from mpidl.errors import ArgumentError
from mpidl.training.data import Position, held_out_batches, training_share
from mpidl.training.outputs import Folder
from mpidl.training.progress import Bar, Figures, Lines, new_progress


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("name", ["summary.json", "checkpoints", "metrics.jsonl", "metrics.3.jsonl"])
def test_outputs_of_an_earlier_run_are_refused_and_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old") if "." in name else (tmp_path / name / "000001").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=rf"(?s){name}.*--overwrite"):
        Folder(tmp_path).prepare(overwrite=False)
    assert names(tmp_path) == sorted([name, "notes.txt"])
    Folder(tmp_path).prepare(overwrite=True)
    assert names(tmp_path) == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match="--output"):
            Folder(path).prepare(overwrite=True)


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    metrics = Folder(tmp_path).metrics(rank=2)
    metrics.open()
    metrics.write({"loss": 0.5})
    assert json.loads((tmp_path / "metrics.2.jsonl").read_text()) == {"loss": 0.5}
    metrics.close()


def test_metrics_go_on_behind_the_records_of_the_steps_that_count(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    metrics = Folder(tmp_path).metrics(None, steps=5)
    metrics.open()
    metrics.write({"step": 7})
    metrics.close()
    assert file.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 7}\n'
    Folder(tmp_path).metrics(None, steps=9).open()
    assert len(file.read_text().splitlines()) == 3
    file.write_text('{"step": 2}\n{"ste')  # the crash came while the second was written
    Folder(tmp_path).metrics(None, steps=9).open()
    assert file.read_text() == '{"step": 2}\n'


def test_without_a_checkpoint_only_metrics_may_be_lost(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("old")
    Folder(tmp_path).prepare_without_checkpoint()
    assert names(tmp_path) == []
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(ArgumentError, match=r"summary\.json, but no checkpoint"):
        Folder(tmp_path).prepare_without_checkpoint()
    assert names(tmp_path) == ["summary.json"]


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
        batches = [list(share.epoch(Position(epoch))) for share in shares]
        assert {len(one) for one in batches} == {shares[0].steps}
        assert all(len(batch) == count for one in batches for batch, count in one)
        assert {int(i) for one in batches for batch, _ in one for i in batch} == set(range(10))
    first, second = ([batch.tolist() for batch, _ in shares[0].epoch(Position(epoch))] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize(("before", "now"), [(2, 2), (2, 3), (3, 2), (4, 1), (1, 4)])
def test_an_epoch_goes_on_with_the_samples_that_are_left(before: int, now: int) -> None:
    def drawn(size: int, rank: int, start: Position, steps: int | None) -> list[int]:
        share = training_share(torch.arange(50), rank, size, 3, seed=1)  # type: ignore[arg-type]
        batches = itertools.islice(share.epoch(start), steps)
        return [int(i) for batch, _ in batches for i in batch]

    first = [i for rank in range(before) for i in drawn(before, rank, Position(epoch=2), 2)]
    start = Position(epoch=2).after(3).after(3).among(before, now, 3)
    rest = [i for rank in range(now) for i in drawn(now, rank, start, None)]
    assert set(first) | set(rest) == set(range(50))
    assert len(first) + len(rest) - 50 < before + 2 * now
    steps = training_share(torch.arange(50), 0, now, 3, seed=1).last_step(start)  # type: ignore[arg-type]
    assert (steps - start.step - 1) * 3 < len(rest) / now <= (steps - start.step) * 3


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
