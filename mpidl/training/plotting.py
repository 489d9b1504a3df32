"""Runs of `mpidl train` in one picture: loss, accuracy, staleness, communication. Reads files; needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpidl.errors import ArgumentError
from mpidl.training.outputs import SUMMARY

_POINTS = 60  # of a curve: records are averaged over as many as it takes


@dataclass(frozen=True)
class Run:
    """What one output folder holds.

    Attributes:
        name: for the legend.
        records: of all ranks that wrote some, by time; `samples` is the sum over all ranks so far.
        summary: empty while the run has not come to its end.
    """

    name: str
    records: list[dict[str, float]]
    summary: dict[str, Any]


def read(folder: Path) -> Run:
    """Returns what a run has written so far.

    Raises:
        ArgumentError: the folder holds no metrics, or a file is damaged.
    """
    files = sorted(folder.glob("metrics*.jsonl"))
    if not files:
        raise ArgumentError(f"{folder} holds no metrics.jsonl: expected the --output of `mpidl train`")
    records = sorted((record for file in files for record in _records(file)), key=lambda record: record["seconds"])
    if not records:
        raise ArgumentError(f"{folder}: its metrics are empty; the run has recorded nothing yet")
    samples = 0.0
    for record in records:
        samples += record["samples"]
        record["samples"] = samples
    try:
        summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).exists() else {}
    except ValueError as error:
        raise ArgumentError(f"{folder / SUMMARY} is damaged: {error}") from error
    what = f"{summary['algorithm']}, {summary['ranks']} ranks" if summary else "not finished"
    return Run(f"{folder.name} ({what})", records, summary)


def _records(file: Path) -> Iterator[dict[str, float]]:
    lines = file.read_text().split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is still being written
        try:
            record = json.loads(line)
            yield {name: float(record[name]) for name in ("seconds", "samples", "loss")}
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"{file}, line {number}: not a record of `mpidl train` ({error})") from error


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draws all runs into one picture; its format follows the file's suffix.

    Raises:
        ArgumentError: matplotlib is not there, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("mpidl plot needs matplotlib: pip install 'mpidl[plot]'") from error
    figure: Any = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 2)
    for panel, axis in zip(panels[0], ("seconds", "samples"), strict=True):
        _losses(panel, runs, axis)
    for panel, axis in zip(panels[1], ("wall_seconds", "samples"), strict=True):
        _accuracies(panel, runs, axis)
    _staleness(panels[2][0], runs)
    _communication(panels[2][1], runs)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(runs)), fontsize=9)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--output {file} cannot be written: {error}") from error


def smoothed(records: Sequence[dict[str, float]], axis: str) -> tuple[list[float], list[float]]:
    """Returns the places and means of as many records in a row as leave about 60 points."""
    each = max(1, len(records) // _POINTS)
    parts = [records[at : at + each] for at in range(0, len(records), each)]
    return [part[-1][axis] for part in parts], [sum(r["loss"] for r in part) / len(part) for part in parts]


def _losses(panel: Any, runs: Sequence[Run], axis: str) -> None:
    for number, run in enumerate(runs):
        panel.plot(*smoothed(run.records, axis), color=f"C{number % 10}", label=run.name)
    panel.set(xlabel=axis, ylabel="training loss", yscale="log")
    panel.grid(alpha=0.3)


def _accuracies(panel: Any, runs: Sequence[Run], axis: str) -> None:
    """One point for each run: accuracy is measured at its end."""
    known = [(n, run.summary) for n, run in enumerate(runs) if run.summary.get("held_out_accuracy") is not None]
    for number, summary in known:
        place = summary[axis], summary["held_out_accuracy"]
        panel.plot(*place, "o", color=f"C{number % 10}")
        panel.annotate(f" {place[1]:.4f}", place, fontsize=8)
    panel.set(xlabel=axis.removeprefix("wall_"), ylabel="held-out accuracy at the end")
    panel.margins(0.15)
    panel.grid(alpha=0.3)
    if not known:
        _nothing(panel, "no run with an accuracy has finished")


def _staleness(panel: Any, runs: Sequence[Run]) -> None:
    known = [(n, run.summary["staleness"]) for n, run in enumerate(runs) if run.summary.get("staleness")]
    for place, (number, histogram) in enumerate(known):
        total, width = sum(histogram.values()), 0.8 / len(known)
        at = [int(tau) - 0.4 + width * (place + 0.5) for tau in histogram]
        panel.bar(at, [count / total for count in histogram.values()], width, color=f"C{number % 10}")
    panel.set(xlabel="staleness: commits of others between pull and commit", ylabel="share of commits")
    if not known:
        _nothing(panel, "no asynchronous run has finished")


def _communication(panel: Any, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        share = 100 * run.summary.get("seconds_communicating", 0.0) / run.summary.get("wall_seconds", 1.0)
        panel.barh(number, share, color=f"C{number % 10}")
        panel.annotate(f" {share:.0f} %" if run.summary else " not finished", (share, number), va="center", fontsize=8)
    panel.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="% of the time in communication", xlim=(0, 110))


def _nothing(panel: Any, why: str) -> None:
    panel.text(0.5, 0.5, why, ha="center", va="center", transform=panel.transAxes, color="gray")
