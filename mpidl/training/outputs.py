"""The output folder of one run: metrics.jsonl or metrics.<rank>.jsonl, checkpoint.pt, summary.json.

Checkpoint and summary are written to a temporary file beside them, synced and renamed: a reader sees the old file or
the new one, never a part. Nothing communicates here.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from mpidl.errors import ArgumentError

SUMMARY, CHECKPOINT = "summary.json", "checkpoint.pt"


class Folder:
    """The folder, and the only names that are ever written or removed in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self, overwrite: bool) -> None:
        """Makes the folder ready for a new run; to be called on one rank, before any other writes.

        Raises:
            ArgumentError: it holds the outputs of another run and `overwrite` is False, or it cannot be written.
        """
        old = self._outputs()
        if old and not overwrite:
            state = "a finished run" if self.path / SUMMARY in old else "an unfinished run"
            names = ", ".join(file.name for file in old)
            raise ArgumentError(
                f"--output {self.path} holds {state} ({names}): choose another folder, or give --overwrite"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in old:
                file.unlink()
            _write_whole(self.path / ".mpidl-writable", lambda stream: None)
            (self.path / ".mpidl-writable").unlink()
        except OSError as error:
            raise ArgumentError(f"--output {self.path} cannot be written: {error}") from error

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Replaces checkpoint.pt. `content`: tensors, numbers, strings and containers of them, nothing else."""
        _write_whole(self.path / CHECKPOINT, lambda stream: torch.save(dict(content), stream))

    def write_summary(self, content: Mapping[str, Any]) -> None:
        """Replaces summary.json."""
        text = json.dumps(content, indent=2, allow_nan=True) + "\n"
        _write_whole(self.path / SUMMARY, lambda stream: stream.write(text.encode()))

    def metrics(self, rank: int | None) -> MetricsFile:
        """Opens metrics.jsonl, or metrics.<rank>.jsonl if a rank is given."""
        return MetricsFile(self.path / ("metrics.jsonl" if rank is None else f"metrics.{rank}.jsonl"))

    def _outputs(self) -> list[Path]:
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise ArgumentError(f"--output {self.path} is not a folder")
        named = [self.path / SUMMARY, self.path / CHECKPOINT, self.path / "metrics.jsonl"]
        return [file for file in named if file.exists()] + sorted(self.path.glob("metrics.[0-9]*.jsonl"))


class MetricsFile:
    """One JSON object a line, on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # the rename must not reach the disk before the content
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
