"""Runs files of tests/mpi inside ranks, watches them, and gathers what they found.

Every rank keeps files of its own in a folder of the launch (rank_main.py and mpi/conftest.py write them, `K` is the
rank): `K.pid`; `K.log`, all that it printed; `K.jsonl`, a line for each test begun and ended and one for the end;
`K.failure`, the report of a failed test; `K.stacks`, the stack of every thread, written on DUMP_SIGNAL.
The parent, which never starts MPI, decides by these files alone: a launcher's return code is not proof enough.
"""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import TIME_LIMIT, Running, alive, start_ranks

FOLDER = "MPIDL_TESTS_FOLDER"  # set inside ranks: where their files go
RANKS = "MPIDL_TESTS_RANKS"  # set inside ranks: how many there are
ALL = "MPIDL_TESTS_ALL"  # set by --all: every size and every combination of parameters
DUMP_SIGNAL = signal.SIGUSR2  # a rank answers it with its stacks, also from inside a C call
OUTSIDE = "this rank is outside a communicator of this size"
GRACE = 10.0  # seconds that the others get to end after one rank has vanished

_DEFAULT_RANKS = (4,)
_TAIL = 4000  # characters of a rank's log that a report shows


@dataclass(frozen=True)
class Settings:
    """What a test file says at top level, read without importing it."""

    ranks: tuple[int, ...] = _DEFAULT_RANKS  # RANKS = (4, 8): one launch each
    time_limit: float = TIME_LIMIT  # TIME_LIMIT = 60: seconds without a test's beginning or end on any rank
    with_others: bool = False  # WITH_OTHERS = True: may share a launch, since it leaves nothing behind
    any_mpi: bool = False  # ANY_MPI = True: the same on every MPI, so that one of them is enough


@dataclass
class Outcome:
    """What came of one launch."""

    passed: int = 0
    failed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # test -> why
    seconds: dict[str, float] = field(default_factory=dict)  # test -> how long it took on rank 0
    launch_seconds: float = 0.0  # of the whole launch, at the first of its files; else 0
    problem: str = ""  # empty if all went well; else the whole report

    def __str__(self) -> str:
        parts = [f"{self.passed} passed", f"{len(self.skipped)} skipped"]
        if self.problem:
            parts.insert(0, f"{self.failed} failed")
        launch = f", of a launch of {self.launch_seconds:.1f} s" if self.launch_seconds else ""
        return f"{', '.join(parts)} inside the ranks in {sum(self.seconds.values()):.1f} s{launch}"


def settings(path: Path) -> Settings:
    """Reads RANKS, TIME_LIMIT, WITH_OTHERS and ANY_MPI from a test file's top level."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(), str(path)).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("RANKS", "TIME_LIMIT", "WITH_OTHERS", "ANY_MPI"):
                found[name] = ast.literal_eval(node.value)
    ranks, limit = tuple(found.get("RANKS", _DEFAULT_RANKS)), float(found.get("TIME_LIMIT", TIME_LIMIT))
    return Settings(ranks, limit, bool(found.get("WITH_OTHERS", False)), bool(found.get("ANY_MPI", False)))


def run_files(paths: Sequence[Path], ranks: int, root: Path, arguments: tuple[str, ...] = ()) -> list[Outcome]:
    """Runs the tests of some files in one launch of `ranks` ranks; `arguments` go to the pytest inside.

    Returns:
        What came of each file, in order, up to the one that failed: those behind it have not come to their end.
    """
    limits = [settings(path).time_limit for path in paths]
    folder = Path(tempfile.mkdtemp(prefix="mpidl-ranks-"))
    # Ranks that wait for each other take whole cores; programs that another suite tests meanwhile are to go first.
    program = ["nice", "-n", "5", sys.executable, str(Path(__file__).with_name("rank_main.py")), *map(str, paths)]
    env = {FOLDER: str(folder), RANKS: str(ranks), "MPIDL_TESTS_LIMIT": str(sum(limits)), "PYTHONUNBUFFERED": "1"}
    running = start_ranks(ranks, [*program, *arguments], env=env, cwd=root)
    try:
        stopped, vanished = _watch(running, folder, ranks, max(limits))
        running.kill()
        whole = running.process.returncode == 0 and _all_ended_well(folder, ranks)
        if not whole and len(paths) > 1 and not _begun(folder, ranks):  # one cannot even be imported: which?
            return run_files(paths[:1], ranks, root, arguments)
        outcomes = [_judge(folder, ranks, path) for path in _came_to(folder, ranks, paths, whole)]
        outcomes[0].launch_seconds = running.seconds
        if not whole or stopped:
            outcomes[-1].failed = max(outcomes[-1].failed, 1)
            outcomes[-1].problem = _report(folder, ranks, running, stopped, vanished)
        for outcome in outcomes:
            if not (outcome.problem or outcome.passed or outcome.skipped or arguments):
                outcome.problem = "not one test was collected inside the ranks"
        return outcomes
    finally:
        running.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _came_to(folder: Path, ranks: int, paths: Sequence[Path], whole: bool) -> Sequence[Path]:
    """The files that had their turn: all, or those up to the one in which some rank's last test stands."""
    if whole:
        return paths
    begun = _begun(folder, ranks)
    last = max((i for i, path in enumerate(paths) if any(_is_of(test, path) for test in begun)), default=0)
    return paths[: last + 1]


def _begun(folder: Path, ranks: int) -> list[str]:
    return [line["begun"] for rank in range(ranks) for line in _lines(folder, rank) if "begun" in line]


def _is_of(test: str, path: Path) -> bool:
    return Path(test.partition("::")[0]).name == path.name


def _all_ended_well(folder: Path, ranks: int) -> bool:
    return all((lines := _lines(folder, rank)) and lines[-1].get("exit") == 0 for rank in range(ranks))


def _watch(running: Running, folder: Path, ranks: int, limit: float) -> tuple[str, list[int]]:
    """Waits for the end; returns why the launch had to be stopped, if so, and which ranks vanished by themselves.

    A launch has hung when no test has begun or ended on any rank for `limit` seconds. The whole launch has no limit:
    how long it takes is a matter of who else computes on this machine.
    """
    mourned, noted, moved = math.inf, 0, 0.0
    while running.process.poll() is None:
        time.sleep(0.05)
        vanished = [rank for rank in range(ranks) if _vanished(folder, rank)]
        if vanished:
            mourned = min(mourned, running.seconds)
        if (now := _noted(folder, ranks)) != noted:
            noted, moved = now, running.seconds
        if running.seconds > moved + limit:
            _dump_stacks(folder, ranks)
            return f"the time limit of {limit:.0f} s is over, in which no test began or ended", vanished
        if running.seconds > mourned + GRACE:
            _dump_stacks(folder, ranks)
            return f"a rank vanished and the others were still there {GRACE:.0f} s later", vanished
    return "", [rank for rank in range(ranks) if _vanished(folder, rank)]


def _noted(folder: Path, ranks: int) -> int:
    """How many characters the ranks have written about their tests."""
    notes = [folder / f"{rank}.jsonl" for rank in range(ranks)]
    return sum(note.stat().st_size for note in notes if note.exists())


def _vanished(folder: Path, rank: int) -> bool:
    """Whether the process of `rank` is gone without having written its last line, which victims of others do too."""
    pid = _text(folder / f"{rank}.pid")
    return bool(pid) and not alive(int(pid)) and not any("exit" in line for line in _lines(folder, rank)[-1:])


def _dump_stacks(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        pid = _text(folder / f"{rank}.pid")
        if pid and alive(int(pid)):
            os.kill(int(pid), DUMP_SIGNAL)
    time.sleep(1.0)  # the handlers write at once, but two cores may be busy


def _judge(folder: Path, ranks: int, path: Path) -> Outcome:
    """Puts the ranks' files together: a test passed if it ran on some rank and failed on none."""
    verdicts: dict[str, dict[str, str]] = {}
    for line in (line for rank in range(ranks) for line in _lines(folder, rank) if "outcome" in line):
        if _is_of(line["test"], path):
            verdicts.setdefault(line["test"], {})[line["outcome"]] = line["why"]
    ended = (line for line in _lines(folder, 0) if "ended" in line and _is_of(line["ended"], path))
    outcome = Outcome(seconds={line["ended"]: line["seconds"] for line in ended})
    for test, found in verdicts.items():
        if "failed" in found:
            outcome.failed += 1
        elif "passed" in found:
            outcome.passed += 1
        else:
            outcome.skipped[test] = found.get("skipped", OUTSIDE)
    return outcome


def _report(folder: Path, ranks: int, running: Running, stopped: str, vanished: list[int]) -> str:
    """The culprits first: failed ranks' reports; else where every rank was and what it last printed."""
    parts = [stopped] if stopped else []
    failures = {rank: text for rank in range(ranks) if (text := _text(folder / f"{rank}.failure"))}
    parts += [_headed(f"rank {rank} of {ranks} failed", text) for rank, text in failures.items()]
    for rank in range(ranks):
        where = _place(_lines(folder, rank))
        if rank in vanished and not failures:
            parts.append(f"rank {rank} of {ranks} left without a word, {where}")
        if stacks := _text(folder / f"{rank}.stacks"):
            parts.append(_headed(f"rank {rank} of {ranks}, {where}: stacks, newest call first", _own_frames(stacks)))
        if not failures and (log := _text(folder / f"{rank}.log").strip()):
            parts.append(_headed(f"rank {rank} of {ranks}: end of its log", log[-_TAIL:]))
    parts.append(f"the launcher returned {running.process.returncode}")
    if printed := running.printed().strip():
        parts.append(_headed("the launcher printed", printed[-_TAIL:]))
    return "\n".join(parts)


def _own_frames(stacks: str) -> str:
    """The stacks without the frames of pytest, thirty of which stand under every test."""
    return "\n".join(line for line in stacks.splitlines() if "/_pytest/" not in line and "/pluggy/" not in line)


def _headed(title: str, text: str) -> str:
    return f"{f' {title} ':-^100}\n{text.rstrip()}\n"


def _place(lines: list[dict[str, Any]]) -> str:
    begun = [line["begun"] for line in lines if "begun" in line]
    ended = {line["test"] for line in lines if "outcome" in line}
    if not begun:
        return "before its first test"
    return f"{'after' if begun[-1] in ended else 'in'} {begun[-1]}"


def _lines(folder: Path, rank: int) -> list[dict[str, Any]]:
    whole = _text(folder / f"{rank}.jsonl").rpartition("\n")[0]  # a line without its end is still being written
    return [json.loads(line) for line in whole.splitlines()]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
