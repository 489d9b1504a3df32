"""What pytest does in the parent process, which never starts MPI: files of tests/mpi become launches of ranks.

    pytest                                   the whole suite on this environment's MPI, without a SLURM cluster
    pytest -n 4 tests/programs tests/unit    several tests at once (pytest-xdist); launches of tests/mpi stay one by one
    pytest --all                             every size and every combination of parameters, see mpi/conftest.py
    pytest -m slurm                          on a SLURM cluster of its own (root; see slurm/cluster.sh)
    pytest -m guards                         the tests of the tests: each planted fault must turn one red
    pytest tests/mpi --inside='-k float16'   arguments for the pytest inside the ranks

Inside the ranks this file steps aside; mpi/conftest.py acts there.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bed import ALL, FOLDER, Outcome, run_files, settings
from launching import kill_all

_INSIDE = FOLDER in os.environ
_MPI_TESTS = Path(__file__).parent / "mpi"
_IN_ONE_LAUNCH = 14  # files
_SHOWN_SLOWEST = 20  # tests
_OUTCOME = "outcome inside the ranks"  # the property of a report that holds it, see RanksItem
_outcomes = pytest.StashKey[dict[str, Outcome]]()  # what this process has launched: name of an item -> outcome
_ON_REQUEST = {"slurm": "tests on a SLURM cluster", "guards": "tests of the tests"}
_left_out = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--inside", default="", help="arguments for the pytest inside the ranks, one shell-like string")
    parser.addoption("--all", action="store_true", help="every size and combination of parameters inside the ranks")
    parser.addoption("--totals", default="", help="append 'passed failed skipped', ranks' tests included, to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_outcomes] = {}
    config.stash[_left_out] = {}
    if config.getoption("--all"):
        os.environ[ALL] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """What xdist's workers get: all of tests/mpi goes to one, since ranks that wait take whole cores; a file whose
    tests share a fixture goes to one too, or each worker would make the fixture again.

    xdist's own groups change a test's name in a way that pytest 9.2 does not notice.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneWorkerEach(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            if _MPI_TESTS in file.parents:
                return str(_MPI_TESTS)
            return str(file) if 'scope="module"' in file.read_text() else nodeid

    return OneWorkerEach(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that are run only when they are asked for."""
    if _INSIDE:
        return
    for mark in _ON_REQUEST:
        left_out = [item for item in items if mark not in config.option.markexpr and item.get_closest_marker(mark)]
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
            config.stash[_left_out][mark] = len(left_out)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if _INSIDE or _MPI_TESTS not in module_path.parents:
        return None
    collector: pytest.Collector = RanksFile.from_parent(parent, path=module_path)
    return collector


class RanksFile(pytest.File):
    """A file of tests/mpi: one item for each number of ranks that it asks for."""

    def collect(self) -> Iterator[pytest.Item]:
        for ranks in settings(self.path).ranks:
            yield RanksItem.from_parent(self, name=f"{ranks}-ranks", ranks=ranks)


class RanksFailedError(Exception):
    """A launch went wrong; its text is the report."""


class RanksItem(pytest.Item):
    """A test file in ranks: a launch of its own, or a part of one with other files."""

    def __init__(self, *, ranks: int, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.ranks = ranks
        found = settings(self.path)
        self.with_others = found.with_others
        if found.any_mpi:
            self.add_marker(pytest.mark.any_mpi)

    def runtest(self) -> None:
        outcomes = self.config.stash[_outcomes]
        if self.nodeid not in outcomes:
            inside = tuple(shlex.split(self.config.getoption("--inside")))
            items = self._together() if self.with_others and not inside else [self]
            found = run_files([item.path for item in items], self.ranks, self.config.rootpath, inside)
            outcomes |= {item.nodeid: outcome for item, outcome in zip(items, found, strict=False)}
        outcome = outcomes[self.nodeid]
        self.user_properties.append((_OUTCOME, asdict(outcome)))  # with the report it comes to whichever process prints
        if outcome.problem:
            raise RanksFailedError(f"{outcome}\n{outcome.problem}")

    def _together(self) -> list[RanksItem]:
        """This item and the next few that may share its launch; torch's import takes longer than most files."""
        done = self.config.stash[_outcomes]
        return [
            item
            for item in self.session.items
            if isinstance(item, RanksItem) and item.with_others and item.ranks == self.ranks and item.nodeid not in done
        ][:_IN_ONE_LAUNCH]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        if isinstance(excinfo.value, RanksFailedError):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} with {self.ranks} ranks"


def pytest_runtest_teardown() -> None:
    """A failed test may have left its ranks running; and no test may start MPI here, where ranks are launched from."""
    if not _INSIDE:
        kill_all()
        if "mpi4py.MPI" in sys.modules:
            raise AssertionError("this test, or one before it, imported mpi4py.MPI in the parent of the ranks")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Shows what ran inside the ranks, which pytest counts as one item a launch."""
    if hasattr(config, "workerinput"):  # one of xdist's workers, whose reports come to the process that prints
        return
    outcomes = _reported(terminalreporter)
    if outcomes:
        terminalreporter.section("inside the ranks")
    for name, outcome in outcomes.items():
        terminalreporter.write_line(f"{name}: {outcome}")
        for test, why in outcome.skipped.items():
            terminalreporter.write_line(f"    SKIPPED {test.rpartition('::')[2]}: {why}")
    if outcomes:
        terminalreporter.section("slowest inside the ranks")
    for line in _slowest(outcomes):
        terminalreporter.write_line(line)
    for mark, count in config.stash[_left_out].items():
        terminalreporter.write_line(f"{count} {_ON_REQUEST[mark]} were not run: pytest -m {mark}")
    if config.getoption("--totals"):
        _write_totals(Path(config.getoption("--totals")), terminalreporter.stats, outcomes)


def _reported(terminalreporter: pytest.TerminalReporter) -> dict[str, Outcome]:
    """The outcomes of all launches, in this process or in xdist's workers: name of an item -> outcome."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found: dict[str, Any] = {report.nodeid: dict(report.user_properties).get(_OUTCOME) for report in reports}
    return {name: Outcome(**outcome) for name, outcome in found.items() if outcome}


def _slowest(outcomes: dict[str, Outcome]) -> list[str]:
    """The tests inside the ranks that took longest: pytest's --durations sees whole launches only."""
    seconds = [
        (taken, f"{test.rpartition('/')[2]} in {name.rpartition('::')[2]}")
        for name, outcome in outcomes.items()
        for test, taken in outcome.seconds.items()
    ]
    return [f"{taken:8.2f} s {test}" for taken, test in sorted(seconds, reverse=True)[:_SHOWN_SLOWEST]]


def _write_totals(file: Path, stats: dict[str, list[object]], outcomes: dict[str, Outcome]) -> None:
    """A launch counts by the tests inside it, not as one test of the parent's."""

    def outer(*kinds: str) -> int:
        reports = [report for kind in kinds for report in stats.get(kind, [])]
        return sum(getattr(report, "nodeid", "") not in outcomes for report in reports)

    passed = outer("passed") + sum(outcome.passed for outcome in outcomes.values())
    failed = outer("failed", "error") + sum(outcome.failed or bool(outcome.problem) for outcome in outcomes.values())
    skipped = outer("skipped") + sum(len(outcome.skipped) for outcome in outcomes.values())
    with file.open("a") as stream:
        stream.write(f"{passed} {failed} {skipped}\n")
