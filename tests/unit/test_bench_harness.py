"""The harness of `mpidl bench`: turns, checks, who is slowest; files; what the page and the picture show."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpidl.cli.bench import harness, machine, models, plot, report, session
from mpidl.cli.bench.harness import Case, Contender, Plan, Series, measure
from mpidl.cli.bench.judging import FEWEST_ROUNDS, judge
from mpidl.cli.bench.ranks import Alone
from mpidl.cli.bench.results import Result, Writer, read
from mpidl.cli.bench.targets import TARGETS
from mpidl.cli.group import cli
from mpidl.errors import ArgumentError

CASE = Case("case", {"n": 1}, 2.0)
PLAN = Plan(warm_ups=2, rounds=4, turn=0.0)
RUN: dict[str, Any] = {
    "benchmark": "pack",
    "command": "mpidl bench pack",
    "date": "2026-11-24 16:40",
    "quick": False,
    "rounds": 20,
    "warm_ups": 6,
    "ranks": 1,
    "nodes": 1,
    "cores": [0],
    "reference": "memcpy",
    "rate": "M elements/s",
    "hardware": machine.hardware(),
    "versions": {"torch": "2.13.0"},
    "load": {"busy_cores": 0.0, "load_1min": 0.1},
}
END = {"seconds": 3.0, "load": {"busy_cores": 0.0, "load_1min": 0.1}, "preemptions": [0]}
BIG = {"direction": "pack", "tensors": 161, "dtype": "float32"}


class Noted:
    """A contender that notes its turns."""

    def __init__(self, turns: list[str], name: str, complaints: tuple[str, str] = ("", "")) -> None:
        self._turns, self.name, self._complaints = turns, name, list(complaints)

    def run(self) -> None:
        self._turns.append(self.name)

    def contender(self) -> Contender:
        return Contender(self.name, self.run, lambda: self._complaints.pop(0))


def test_contenders_alternate_and_take_turns_at_beginning() -> None:
    turns: list[str] = []
    found = measure(CASE, [Noted(turns, name).contender() for name in "abc"], Alone(), PLAN)
    assert "".join(turns) == "abcbca" + "abcbcacababc"  # two rounds to warm up, four measured
    assert [(one.contender, len(one.seconds), one.repeats, one.amount) for one in found] == [
        (name, 4, 1, 2.0) for name in "abc"
    ]


def test_enough_rounds_and_warm_ups_by_default() -> None:
    assert Plan().warm_ups >= 6
    assert Plan().rounds >= FEWEST_ROUNDS >= 15
    assert harness.QUICK.rounds < FEWEST_ROUNDS  # a quick run decides nothing


def test_short_operations_are_repeated_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def lasting(name: str, seconds: float) -> Contender:
        return Contender(name, lambda: now.__setitem__(0, now[0] + seconds), lambda: "")

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    contenders = [lasting("fast", 2**-13), lasting("slow", 2**-6), lasting("fastest", 2**-20)]
    found = measure(CASE, contenders, Alone(), Plan(warm_ups=2, rounds=3, turn=2**-7, most_repeats=100))
    assert [one.repeats for one in found] == [64, 1, 100]
    assert [one.seconds for one in found] == [[2**-13] * 3, [2**-6] * 3, [2**-20] * 3]  # of one operation, not a turn
    before = now[0]
    measure(Case("case", {}, 1.0, least_repeats=5), [lasting("slow", 1.0)], Alone(), Plan(2, 3, 0.0))
    assert now[0] - before == 2 + 3 * 5


def test_a_wrong_result_is_no_figure() -> None:
    turns: list[str] = []
    before = Noted(turns, "before", ("5 for 4", ""))
    after = Noted(turns, "after", ("", "6 for 4"))
    found = measure(CASE, [one.contender() for one in (before, after, Noted(turns, "right"))], Alone(), PLAN)
    assert [(one.contender, bool(one.seconds), one.complaint) for one in found] == [
        ("before", False, "rank 0: 5 for 4"),
        ("after", False, "rank 0: 6 for 4"),
        ("right", True, ""),
    ]
    assert "before" not in turns  # what is wrong is not measured


class Pair(Alone):
    """As if a second rank took three seconds more for everything, and found nothing wrong but at the end."""

    size = 2

    def everywhere(self, mine: Any) -> list[Any]:
        if isinstance(mine, str):
            return [mine, "the other's complaint" if mine == "last" else ""]
        nested = bool(mine) and isinstance(mine[0], list)
        return [mine, [[x + 3 for x in row] for row in mine] if nested else [x + 3 for x in mine]]


def test_the_slowest_rank_counts() -> None:
    (series,) = measure(CASE, [Contender("c", lambda: None, lambda: "")], Pair(), PLAN)
    assert all(seconds >= 3 for seconds in series.seconds)
    assert len(series.seconds) == 4


def test_what_one_rank_finds_wrong_counts_for_all() -> None:
    (series,) = measure(CASE, [Contender("c", lambda: None, lambda: "last")], Pair(), PLAN)
    assert series.complaint == "rank 0: last"
    assert not series.seconds


# ---------------------------------------------------------------------------------------------------------- files


def series(contender: str, seconds: float, complaint: str = "") -> Series:
    return Series("pack it", BIG, 25.0, contender, [] if complaint else [seconds] * 20, 1, complaint)


def write(file: Path, *found: Series, **run: Any) -> Path:
    writer = Writer(file, RUN | run)
    writer.add(found)
    writer.close(END)
    return file


def test_a_file_of_json_lines_holds_everything(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", series("memcpy", 1.0), series("mpidl.pack", 2.0, "a bit is wrong"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "series", "series", "end"]
    assert {"command", "hardware", "versions", "ranks", "load", "cores"} <= set(lines[0])
    found = read(file)
    assert found.series == (series("memcpy", 1.0), series("mpidl.pack", 2.0, "a bit is wrong"))
    assert found.run == RUN
    assert found.end["series_count"] == 2
    assert [one.contender for one in found.failures] == ["mpidl.pack"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: lines[:-1], "not written to its end"),
        (lambda lines: [*lines[:1], *lines[2:]], "not written to its end"),
        (lambda lines: lines[:1], "not written to its end"),
        (lambda lines: lines[1:], "no result of mpidl bench"),
        (lambda lines: [*lines[:-1], lines[-1][:9]], "cut off"),
        (lambda lines: ["{}"], "no result of mpidl bench"),
        (lambda lines: [], "no result of mpidl bench"),
    ],
)
def test_an_incomplete_file_is_refused_by_name(tmp_path: Path, damage: Any, words: str) -> None:
    file = write(tmp_path / "x.jsonl", series("memcpy", 1.0), series("mpidl.pack", 2.0))
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(ArgumentError, match=words) as refused:
        read(file)
    assert "x.jsonl" in str(refused.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"absent\.jsonl cannot be read"):
        read(tmp_path / "absent.jsonl")


# ------------------------------------------------------------------------------------------------- page and picture


def page(file: Path) -> str:
    results = [read(file)]
    return report.page(results, judge(results))


def test_the_page_has_circumstances_figures_and_verdicts(tmp_path: Path) -> None:
    text = page(write(tmp_path / "x.jsonl", series("memcpy", 0.001), series("mpidl.pack", 0.0005)))
    assert "`mpidl bench pack`" in text
    assert "torch 2.13.0" in text
    assert f"{os.cpu_count()} cores of" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["pack it", "mpidl.pack", "0.5 (0.5 - 0.5)", "50,000", "2 (2 - 2)"] in cells
    assert ["pack it", "memcpy", "1 (1 - 1)", "25,000", "1"] in cells
    verdict = ["pack, 25 M floats", "pack it", "", "mpidl.pack", "memcpy", "speed >= 0.95", "2 (2 - 2)", "2 - 2"]
    assert [*verdict, "**met**"] in cells
    assert "do not believe" not in text


def test_the_page_shows_wrong_results_and_a_busy_machine(tmp_path: Path) -> None:
    busy = {"busy_cores": 1.2, "load_1min": 3.0}
    file = write(tmp_path / "x.jsonl", series("memcpy", 1.0), series("mpidl.pack", 2.0, "rank 0: torn"), load=busy)
    text = page(file)
    assert "**wrong result: rank 0: torn**" in text
    assert "**failed**: mpidl.pack gave a wrong result" in text
    assert "do not believe" in text


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'mpidl[plot]'")
    sized = [
        Series(f"{n}, {place}", {"nbytes": n, "place": place}, 1.0, name, [n / 1e9 * (1 + i) for i in range(5)], 1, "")
        for n in (4096, 2**20)
        for place in ("out of place", "in place")
        for name in ("mpidl", "gloo")
        if (place, name) != ("out of place", "gloo")
    ]
    for name, found in (("bars", [series("memcpy", 1.0), series("torch.cat", 0.0, "torn")]), ("curves", sized)):
        results = [Result(RUN, tuple(found), END), Result(RUN, tuple(found), END)]
        assert plot.draw(results, tmp_path / f"{name}.png")
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000  # not an empty sheet


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.draw([Result(RUN, (series("memcpy", 1.0),), END)], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_results_are_merged_into_one_page(tmp_path: Path) -> None:
    versions = [{"mpi": "MPICH 5.0.2"}, {"mpi": "Open MPI 5.0.11"}]
    files = [
        str(write(tmp_path / f"{i}.jsonl", series("memcpy", 1.0), series("mpidl.pack", 1.0), versions=versions[i]))
        for i in range(2)
    ]
    done = CliRunner().invoke(cli, ["bench", "report", *files, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "pack.md").read_text()
    assert text.count("## All contenders on") == 2
    assert "Open MPI 5.0.11" in text
    other = str(write(tmp_path / "other.jsonl", benchmark="training"))
    refused = CliRunner().invoke(cli, ["bench", "report", files[0], other, "--output", str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "different benchmarks: pack, training" in refused.output


# ------------------------------------------------------------------------------------------------- what is measured


def test_every_target_meets_a_case_of_its_benchmark() -> None:
    for target in TARGETS:
        benchmark: Any = importlib.import_module(session.BENCHMARKS[target.benchmark].module)
        cases = benchmark.cases(2, False)
        if target.benchmark == "allreduce":
            cases += benchmark.cases(2, False, nodes=2)
        assert any(target.fits(case.parameters) for case in cases), target.name
        assert target.quantity != "excess" or target.baseline
        assert target.relation in (">=", "<=")


def test_sizes_reach_from_4_kib_to_256_mib_in_place_and_not() -> None:
    allreduce: Any = importlib.import_module(session.BENCHMARKS["allreduce"].module)
    found = [(case.parameters["nbytes"], case.parameters["place"]) for case in allreduce.cases(2, False)]
    assert {4 * 2**10, 256 * 2**20} <= {nbytes for nbytes, _ in found}
    assert {(nbytes, "in place") for nbytes, _ in found} | {(nbytes, "out of place") for nbytes, _ in found} == set(
        found
    )


def test_the_models_have_the_sizes_of_their_names() -> None:
    resnet = [p.shape for p in models.resnet18().parameters()]
    assert (len(resnet), sum(shape.numel() for shape in resnet)) == (62, 11_689_512)
    assert sum(p.numel() for p in models.mlp().parameters()) == 669_706
    shapes = models.resnet50_shapes()
    pack: Any = importlib.import_module(session.BENCHMARKS["pack"].module)
    assert len(shapes) == 161
    assert {case.parameters["tensors"] for case in pack.cases(1, False)} == {161, 10_000}
    assert 25.557032 in [case.amount for case in pack.cases(1, False)]


# --------------------------------------------------------------------------------------------------------- launching


def test_a_rank_is_pinned_to_a_core_of_its_own() -> None:
    program = (
        "import os; from mpidl.cli.bench import machine; before = sorted(os.sched_getaffinity(0)); "
        "core = machine.pin(); print(before[1 % len(before)] == core, os.sched_getaffinity(0) == {core}, "
        "os.environ['OMP_NUM_THREADS'])"
    )
    env = {**os.environ, "MPI_LOCALRANKID": "1", "OMP_NUM_THREADS": "8"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1"]


@pytest.mark.parametrize(
    ("launched", "arguments", "advice"),
    [
        ("2", ["pack"], "mpidl bench pack, without a launcher"),
        ("1", ["allreduce"], "mpidl run -n 2 -- mpidl bench allreduce"),
        ("1", ["training"], "mpidl run -n 2 -- mpidl bench training"),
    ],
)
def test_the_wrong_number_of_ranks_is_refused_before_mpi_starts(
    launched: str, arguments: list[str], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_SIZE", launched)
    done = CliRunner().invoke(cli, ["bench", *arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert advice in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["import", "pack", "allreduce", "training", "parameter-server", "report"])
def test_each_benchmark_has_help_with_an_example(name: str) -> None:
    done = CliRunner().invoke(cli, ["bench", name, "--help"])
    assert done.exit_code == 0
    assert "Example:" in done.output
