"""The output folder of one run: metrics.jsonl or metrics.<rank>.jsonl, checkpoints, summary.json.

The summary is written to a temporary file in the same folder, synced and renamed: a reader sees the old file or the new
one, never a part. What a checkpoint is stands in `checkpoint`. Nothing communicates here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from mpidl.errors import ArgumentError

SUMMARY, CHECKPOINTS = "summary.json", "checkpoints"
_EARLIER = "checkpoint.pt"  # what mpidl 0.1 wrote; it held too little to go on from


class Folder:
    """The folder, and the only names that are ever written or removed in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / CHECKPOINTS

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
                f"--output {self.path} holds {state} ({names}): go on with it by --resume, choose another folder, or "
                "give --overwrite"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for entry in old:
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            write_whole(self.path / ".mpidl-writable", lambda stream: None)
            (self.path / ".mpidl-writable").unlink()
        except OSError as error:
            raise ArgumentError(f"--output {self.path} cannot be written: {error}") from error

    def prepare_without_checkpoint(self) -> None:
        """Makes the folder ready for `--resume` where no checkpoint is: only metrics may be lost, never a result.

        Raises:
            ArgumentError: it holds the result of a run, or it cannot be written.
        """
        lost = [file.name for file in self._outputs() if file.name in (SUMMARY, _EARLIER)]
        if lost:
            raise ArgumentError(
                f"--resume: {self.path} holds {' and '.join(lost)}, but no checkpoint to go on from: choose another "
                "folder, or give --overwrite instead"
            )
        self.prepare(overwrite=True)

    def write_summary(self, content: Mapping[str, Any]) -> None:
        """Replaces summary.json."""
        text = json.dumps(content, indent=2, allow_nan=True) + "\n"
        write_whole(self.path / SUMMARY, lambda stream: stream.write(text.encode()))

    def metrics(self, rank: int | None, steps: int = 0) -> MetricsFile:
        """Returns metrics.jsonl, or metrics.<rank>.jsonl if a rank is given, to be opened.

        Args:
            rank: whose records, or None for those of all.
            steps: from where the run goes on: records of later steps are removed, since those steps come again.
        """
        return MetricsFile(self.path / ("metrics.jsonl" if rank is None else f"metrics.{rank}.jsonl"), steps)

    def _outputs(self) -> list[Path]:
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise ArgumentError(f"--output {self.path} is not a folder")
        named = [self.path / name for name in (SUMMARY, CHECKPOINTS, _EARLIER, "metrics.jsonl")]
        return [file for file in named if file.exists()] + sorted(self.path.glob("metrics.[0-9]*.jsonl"))


class MetricsFile:
    """One JSON object a line, on disk as soon as it is written."""

    def __init__(self, path: Path, steps: int = 0) -> None:
        self._path, self._steps = path, steps
        self._stream: IO[str] | None = None

    def open(self) -> None:
        """Removes the records of steps that come again; to be called when nothing can refuse the run any more."""
        kept = _records_until(self._path, self._steps) if self._steps else []
        write_whole(self._path, lambda stream: stream.writelines(kept))
        self._stream = self._path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        assert self._stream is not None, "open() comes first"
        self._stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replaces the file `path` by what `write` writes, or leaves it as it was."""
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
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder are on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _records_until(path: Path, steps: int) -> list[bytes]:
    """The lines of the first `tasks` steps; a line that a crash cut off ends them too."""
    kept: list[bytes] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > steps:
                break
            kept.append(line)
    return kept
