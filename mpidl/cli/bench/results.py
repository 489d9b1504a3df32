"""One run as JSON lines: a `run` line, `series` lines, and an `end` line without which a file is refused.

The file stands by itself: hardware, versions, command, load, and every round of every contender.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpidl.cli.bench.harness import Series
from mpidl.errors import ArgumentError


@dataclass(frozen=True)
class Result:
    """A whole run."""

    run: Mapping[str, Any]  # benchmark, command, hardware, versions, ranks, load before, ...
    series: tuple[Series, ...]
    end: Mapping[str, Any]  # how many series; load after, seconds, preemptions by rank

    @property
    def mpi(self) -> str:
        """The MPI that ran, without its version; empty if none did."""
        return str(self.run["versions"].get("mpi", "")).rpartition(" ")[0]

    def find(self, case: str, contender: str) -> Series | None:
        """Returns the series of one contender in one case."""
        return next((one for one in self.series if (one.case, one.contender) == (case, contender)), None)

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """Case -> its parameters, in the order in which they were measured."""
        return {one.case: one.parameters for one in self.series}

    @property
    def failures(self) -> list[Series]:
        """What gave a wrong result."""
        return [one for one in self.series if one.complaint]


class Writer:
    """Writes a run while it goes on: what was measured before something went wrong is kept."""

    def __init__(self, file: Path, run: Mapping[str, Any]) -> None:
        self._stream = file.open("w", encoding="utf-8", buffering=1)
        self._series = 0
        self._write("run", run)

    def add(self, case: Sequence[Series]) -> None:
        """Appends the series of one case."""
        for series in case:
            self._series += 1
            self._write("series", dataclasses.asdict(series))

    def close(self, end: Mapping[str, Any]) -> None:
        """Appends the line that makes the file whole."""
        self._write("end", {"series_count": self._series, **end})
        self._stream.close()

    def _write(self, kind: str, content: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps({"kind": kind, **content}) + "\n")


def read(file: Path) -> Result:
    """Returns the run in a file.

    Raises:
        ArgumentError: it is not there, is of another kind, or was not written to its end.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kinds = [line.pop("kind") for line in lines]
    except OSError as error:
        raise ArgumentError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ArgumentError(f"{file} is no result of mpidl bench, or its last line is cut off") from error
    if not kinds or kinds[0] != "run" or set(kinds[1:-1]) - {"series"}:
        raise ArgumentError(f"{file} is no result of mpidl bench")
    if kinds[-1] != "end" or lines[-1]["series_count"] != len(lines) - 2:
        raise ArgumentError(f"{file} was not written to its end: the run was interrupted; run it again")
    return Result(lines[0], tuple(Series(**line) for line in lines[1:-1]), lines[-1])
