"""`mpidl plot` refuses by name what is no run, and averages what is too much for a curve; test_train has real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mpidl.cli.group import cli
from mpidl.training import plotting


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["plot", *arguments], prog_name="mpidl")
    assert result.exit_code == 2
    return result.output


def run(folder: Path, *lines: str) -> str:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def record(step: int, loss: float = 1.0) -> str:
    return json.dumps({"epoch": 1, "step": step, "seconds": step * 0.5, "loss": loss, "samples": 10})


def test_what_is_no_run(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nothing'} holds no metrics.jsonl: expected the --output" in refusal(str(tmp_path / "nothing"))
    assert "its metrics are empty" in refusal(run(tmp_path / "empty"))
    assert "line 2: not a record" in refusal(run(tmp_path / "damaged", record(1), '{"loss": 1'))
    assert "line 1: not a record" in refusal(run(tmp_path / "strange", '{"loss": 1}'))
    whole = run(tmp_path / "whole", record(1))
    (tmp_path / "whole" / "summary.json").write_text("{")
    assert "summary.json is damaged" in refusal(whole)


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole = run(tmp_path / "whole", record(1), record(2))
    assert "cannot be written" in refusal(whole, "--output", str(tmp_path / "no" / "folder.png"))
    assert "cannot be written" in refusal(whole, "--output", str(tmp_path / "picture.strange"))


def test_curves_have_about_60_points_and_keep_the_mean(tmp_path: Path) -> None:
    run(tmp_path / "long", *(record(step, float(step % 2)) for step in range(1, 1201)))
    read = plotting.read(tmp_path / "long")
    places, losses = plotting.smoothed(read.records, "samples")
    assert len(places) == 60 and places[-1] == 12000
    assert losses == [0.5] * 60
    assert len(plotting.smoothed(read.records[:7], "seconds")[0]) == 7
