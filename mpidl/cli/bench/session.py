"""One run of one benchmark, in order: pin, start, look around, measure, write, judge, draw."""

from __future__ import annotations

import datetime
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpidl.cli.bench import judging, machine, plot, report
from mpidl.cli.bench.harness import QUICK, Case, Field, Plan, measure
from mpidl.cli.bench.progress import new_progress
from mpidl.cli.bench.ranks import Alone, Ranks, Together
from mpidl.cli.bench.results import Result, Writer, read
from mpidl.errors import ArgumentError


@dataclass(frozen=True)
class Kind:
    """Where a benchmark's code is, and how many ranks it takes; known before torch is imported."""

    module: str
    fewest: int
    most: int | None = None  # 1: a process that needs no MPI


BENCHMARKS = {
    "import": Kind("mpidl.cli.bench.importing", 1, 1),
    "pack": Kind("mpidl.cli.bench.pack", 1, 1),
    "allreduce": Kind("mpidl.cli.bench.allreduce", 2),
    "training": Kind("mpidl.cli.bench.training", 2),
    "parameter-server": Kind("mpidl.cli.bench.parameter_server", 1),
}
WRONG_RESULT, REFUSED = 1, 2  # exit status


@dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    benchmark: str
    output: Path
    quick: bool = False
    rounds: int | None = None
    overwrite: bool = False
    command: str = ""  # as the user wrote it
    terminal_columns: int | None = None

    @property
    def plan(self) -> Plan:
        plan = QUICK if self.quick else Plan()
        return plan if self.rounds is None else Plan(plan.warm_ups, self.rounds, plan.turn, plan.most_repeats)


class Benchmark(Protocol):
    """What a benchmark's module has."""

    REFERENCE: str  # the contender to which the others are compared in tables; rank 0 takes part in every case
    RATE: str  # unit of the cases' amounts, per second

    def cases(self, ranks: int, quick: bool) -> list[Case]:
        """Returns all cases for so many ranks, in order."""

    def fields(self, ranks: Any, quick: bool) -> Iterator[tuple[Case, AbstractContextManager[Field]]]:
        """Yields the cases with who competes in them; what that needs exists only within the context."""


def run(settings: Settings) -> int:
    """Runs a benchmark and writes its files; a collective over all ranks that the launcher started.

    Returns:
        The exit status: 0, or 1 if some contender's result was wrong.

    Raises:
        ArgumentError: it cannot run with so many ranks, or would overwrite an earlier result.
    """
    kind = BENCHMARKS[settings.benchmark]
    _check_ranks(kind, settings.benchmark)
    core = machine.pin()  # now: threads that exist already would stay where they are
    benchmark: Any = importlib.import_module(kind.module)
    ranks = _start(kind)
    file = settings.output / f"{stem(settings.benchmark, ranks)}.jsonl"
    complaint = ranks.everywhere(_prepare(file, settings.overwrite) if ranks.rank == 0 else "")[0]
    if complaint and ranks.rank == 0:
        raise ArgumentError(complaint)
    if complaint:
        return REFUSED  # every rank has the same message: one prints it
    _measure(settings, benchmark, ranks, file, core)
    status = ranks.everywhere(_conclude(file) if ranks.rank == 0 else 0)[0]
    ranks.barrier()  # Open MPI ends the job when the first rank exits with a status: the files come first
    return int(status)


def stem(benchmark: str, ranks: Ranks) -> str:
    """Returns a run's file name without its ending: runs on another MPI, or with more ranks, get another one."""
    from mpidl.mpi import runtime

    if not isinstance(ranks, Together):
        return benchmark
    library = runtime.mpi_description()["library"].lower()
    nodes = f"-on-{ranks.comm.nodes}-nodes" if ranks.comm.nodes > 1 else ""
    return f"{benchmark}-{''.join(letter for letter in library if letter.isalnum())}-{ranks.size}{nodes}"


def conclude(results: list[Result], base: Path) -> None:
    """Writes BASE.md and, if matplotlib is there, BASE.png; prints the page."""
    page = report.page(results, judging.judge(results))
    base.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    if not plot.draw(results, base.with_suffix(".png")):
        print("mpidl bench: no PNG, since matplotlib is missing: pip install 'mpidl[plot]'", file=sys.stderr)
    print(f"mpidl bench: written to {base}.*", file=sys.stderr, flush=True)


def merge(files: Sequence[Path], output: Path) -> None:
    """Writes one page and one picture on the runs in `files`, and prints the page.

    Raises:
        ArgumentError: a file is no whole result, or they are of different benchmarks.
    """
    results = [read(file) for file in files]
    kinds = sorted({str(result.run["benchmark"]) for result in results})
    if len(kinds) > 1:
        raise ArgumentError(f"these are results of different benchmarks: {', '.join(kinds)}; give those of one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        conclude(results, output / kinds[0])
    except OSError as error:
        raise ArgumentError(f"--output {output} cannot be written: {error.strerror}") from error


def _check_ranks(kind: Kind, name: str) -> None:
    launched = machine.launched_ranks()
    if kind.fewest <= launched and (kind.most is None or launched <= kind.most):
        return
    launcher = f"mpidl run -n {kind.fewest} -- mpidl bench {name}"
    wanted = f"mpidl bench {name}, without a launcher" if kind.most == 1 else launcher
    raise ArgumentError(f"bench {name} cannot run as {launched} rank(s): use {wanted}")


def _start(kind: Kind) -> Ranks:
    if kind.most == 1:
        return Alone()
    import mpidl

    return Together(mpidl.world())


def _prepare(file: Path, overwrite: bool) -> str:
    """Returns why the results cannot be written."""
    if file.exists() and not overwrite:
        return f"{file} holds an earlier result: choose another --output, or give --overwrite"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    except OSError as error:
        return f"--output {file.parent} cannot be written: {error.strerror}"
    return ""


def _measure(settings: Settings, benchmark: Any, ranks: Ranks, file: Path, core: int) -> None:
    import torch

    torch.set_num_threads(1)
    plan = settings.plan
    ranks.barrier()
    load = machine.load()
    cores = ranks.everywhere(core)
    started, lost = time.monotonic(), machine.preemptions()
    writer = Writer(file, _header(settings, benchmark, ranks, cores, load)) if ranks.rank == 0 else None
    if ranks.rank == 0 and load["busy_cores"] > machine.BUSY:
        print(f"mpidl bench: something else uses {load['busy_cores']} cores: figures are doubtful", file=sys.stderr)
    count = len(benchmark.cases(ranks.size, settings.quick))
    apart = 0
    progress = new_progress(f"bench {settings.benchmark}", count, settings.terminal_columns, silent=ranks.rank != 0)
    for case, prepared in benchmark.fields(ranks, settings.quick):
        progress.begin(case.name)
        with prepared as field:
            found = [] if field.ranks is None else measure(case, field.contenders, field.ranks, plan)
        if writer is not None:
            writer.add(found)
        ranks.rest()
        apart += any(ranks.everywhere(ranks.apart))
        progress.done()
    progress.close()
    seconds = time.monotonic() - started
    lost_everywhere = ranks.everywhere(machine.preemptions() - lost)
    ranks.barrier()
    end = {"seconds": round(seconds, 1), "load": machine.load(), "preemptions": lost_everywhere, "apart": apart}
    if writer is not None:
        writer.close(end)


def _header(settings: Settings, benchmark: Any, ranks: Ranks, cores: list[int], load: Any) -> dict[str, Any]:
    return {
        "benchmark": settings.benchmark,
        "command": settings.command,
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "quick": settings.quick,
        "rounds": settings.plan.rounds,
        "warm_ups": settings.plan.warm_ups,
        "ranks": ranks.size,
        "nodes": ranks.comm.nodes if isinstance(ranks, Together) else 1,
        "cores": cores,
        "reference": benchmark.REFERENCE,
        "rate": benchmark.RATE,
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "load": load,
    }


def _conclude(file: Path) -> int:
    result = read(file)
    conclude([result], file.with_suffix(""))
    return WRONG_RESULT if result.failures else 0
