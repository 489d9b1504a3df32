"""The test bed itself: what is planted inside the ranks must be reported by the parent, in time, with the culprit.

The files are copied to a folder of their own and run by a pytest of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.guards

TESTS = Path(__file__).parents[1]
BED = ("conftest.py", "launching.py", "bed.py", "pairwise.py", "rank_main.py", "mpi/conftest.py")

WORLD = "import os, sys, time\nfrom mpi4py import MPI\nworld = MPI.COMM_WORLD\n"
PASSES = (
    WORLD
    + """
RANKS = (2, 3)

def test_sum():
    assert world.allreduce(world.rank) == sum(range(world.size))

def test_skipped():
    import pytest
    pytest.skip("planted reason")
"""
)
ASSERTION = (
    WORLD
    + """
def test_before():
    pass

def test_one_rank_fails():
    if world.rank == 2:
        print("printed by the culprit")
        assert world.size == 5, "planted assertion"
    world.Barrier()
"""
)
HANGS = (
    WORLD
    + """
RANKS = (2,)
TIME_LIMIT = 30

def test_one_rank_hangs():
    if world.rank == 1:
        planted_sleep()
    world.Barrier()

def planted_sleep():
    time.sleep(1000)
"""
)
LEAVES = (
    WORLD
    + """
TIME_LIMIT = 60

def test_one_rank_leaves():
    if world.rank == 1:
        os._exit(0)
    world.Barrier()
"""
)
EMPTY = "RANKS = (2,)\n"
BROKEN_IMPORT = "import a_module_that_nobody_has\nRANKS = (2,)\n"
DIFFERENT = (
    WORLD
    + """
RANKS = (2,)

def test_everywhere():
    pass

if world.rank == 1:
    def test_on_one_rank_only():
        pass
"""
)
FIXTURE = """
RANKS = (3,)

def test_sizes(comm):
    assert comm.rank < comm.size

def test_all(world_comm):
    assert world_comm.size == 3
"""
PRODUCT = """
import pytest
RANKS = (3,)

@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", range(3))
def test_it(comm, kind, dtype):
    pass
"""


@dataclass
class Run:
    """What the planted run printed."""

    returncode: int
    printed: str

    def section(self, name: str) -> str:
        """The report of one launch, from its headline to the next one's, or to what follows the last."""
        return re.split(
            r"\n(?:_{3,}|={3,}) (?:test_|slowest|inside|short)", self.printed.partition(f"__ {name} __")[2]
        )[0]


def planted(folder: Path, *arguments: str, **files: str) -> Run:
    """Runs `files` as tests/mpi/test_NAME.py on a copy of the bed; `arguments` go to its pytest."""
    for name in BED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TESTS / name, folder / name)
    for name, text in files.items():
        (folder / "mpi" / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--totals=totals", *arguments, "."]
    # Where CI is set, pytest repeats every message whole in its summary, which the tests below would count twice.
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    return Run(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with every planted failure."""
    folder = tmp_path_factory.mktemp("bad")
    return planted(
        folder,
        assertion=ASSERTION,
        hangs=HANGS,
        leaves=LEAVES,
        empty=EMPTY,
        broken=BROKEN_IMPORT,
        different=DIFFERENT,
    )


def test_what_passes_is_counted(tmp_path: Path) -> None:
    run = planted(tmp_path, passes=PASSES)
    assert run.returncode == 0, run.printed
    assert run.printed.count("1 passed, 1 skipped inside the ranks") == 2  # two launches
    assert "planted reason" in run.printed
    assert (tmp_path / "totals").read_text().split() == ["2", "0", "2"]


def test_of_a_shared_launch_only_the_file_that_fails_fails(tmp_path: Path) -> None:
    good, bad = (
        "def test_good():\n    pass\n",
        "def test_good():\n    pass\n\ndef test_bad():\n    assert not 'planted'\n",
    )
    together = "RANKS = (2,)\nWITH_OTHERS = True\n"
    run = planted(tmp_path, a=together + good, b=together + bad, c=together + BROKEN_IMPORT, d=together + good)
    assert run.returncode == 1
    assert run.printed.count("2-ranks: 1 passed, 0 skipped inside the ranks in") == 2  # d in a launch behind b's
    assert "assert not 'planted'" in run.section("test_b.py with 2 ranks"), run.printed
    assert "No module named 'a_module_that_nobody_has'" in run.section("test_c.py with 2 ranks"), run.printed
    assert (tmp_path / "totals").read_text().split() == ["3", "2", "0"]

    again = planted(tmp_path, b=together + good, c=together + good)
    assert again.returncode == 0, again.printed
    assert again.printed.count("1 passed, 0 skipped inside the ranks in") == 4
    assert again.printed.count(", of a launch of ") == 1


def test_comm_has_some_sizes_and_some_combinations_or_all(tmp_path: Path) -> None:
    run = planted(tmp_path, fixture=FIXTURE, product=PRODUCT)
    assert run.returncode == 0, run.printed
    assert "test_fixture.py::3-ranks: 3 passed, 0 skipped" in run.printed
    (kept,) = re.findall(r"test_product.py::3-ranks: (\d+) passed, 0 skipped", run.printed)
    assert 12 <= int(kept) < 18  # of 24 in sizes 1 and 3: each kind with each dtype is seen once at least
    run = planted(tmp_path, "--all")
    assert run.returncode == 0, run.printed
    assert "test_fixture.py::3-ranks: 4 passed, 0 skipped" in run.printed
    assert "test_product.py::3-ranks: 36 passed, 0 skipped" in run.printed


def test_under_xdist_the_launches_are_counted_and_reported_alike(tmp_path: Path) -> None:
    bad = "RANKS = (2,)\ndef test_bad():\n    assert not 'planted'\n"
    run = planted(tmp_path, "-n", "2", passes=PASSES, bad=bad)
    assert run.returncode == 1, run.printed
    assert run.printed.count("1 passed, 1 skipped inside the ranks") == 2
    assert "assert not 'planted'" in run.printed
    assert "slowest inside the ranks" in run.printed
    assert (tmp_path / "totals").read_text().split() == ["2", "1", "2"]


def test_a_failed_assertion_on_one_rank_names_the_rank_and_shows_its_report(bad: Run) -> None:
    section = bad.section("test_assertion.py with 4 ranks")
    assert bad.returncode == 1
    assert "rank 2 of 4 failed" in section, bad.printed
    assert "planted assertion" in section
    assert "printed by the culprit" in section
    assert "rank 1 of 4 failed" not in section


def test_a_hang_shows_the_stack_of_every_rank(bad: Run) -> None:
    section = bad.section("test_hangs.py with 2 ranks")
    assert "the time limit of 30 s is over" in section, bad.printed
    assert "in planted_sleep" in section
    assert "left without a word" not in section
    assert "rank 0 of 2, in mpi/test_hangs.py::test_one_rank_hangs" in section


def test_a_rank_that_leaves_is_named(bad: Run) -> None:
    section = bad.section("test_leaves.py with 4 ranks")
    assert "rank 1 of 4 failed" in section, bad.printed
    # Before the launcher ends them, other ranks may come to see an MPI error of their own; they do not say this.
    assert "os._exit(0) was called" in section.partition("rank 1 of 4 failed")[2].partition("of 4 failed")[0]
    assert "time limit" not in section


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("test_empty.py with 2 ranks", "pytest ended with status 5"),
        ("test_broken.py with 2 ranks", "No module named 'a_module_that_nobody_has'"),
        ("test_different.py with 2 ranks", "the ranks collected different tests"),
    ],
)
def test_what_cannot_be_collected_is_a_failure(bad: Run, name: str, says: str) -> None:
    assert says in bad.section(name), bad.printed


def test_planted_failures_leave_nobody_behind(bad: Run) -> None:
    assert bad.printed.count("the time limit of ") == 1  # that of the planted hang
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            assert b"test_hangs.py" not in command, f"process {entry.name} is still there"
