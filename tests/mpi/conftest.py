"""What pytest does inside each rank of a launch: the fixtures `comm` and `world_comm`, and one verdict for all ranks.

A test takes `comm` and runs once for each size, on a communicator of the first ranks; ranks outside pass through.
Sizes: 1, 3 and 4 in a launch of up to 4 ranks, 5 and 8 in a larger one; a file may say SIZES = (2, 4) instead, or ask
for launches by RANKS = (4, 8). A size (3, 1) is 3 workers with a server, which serves while the workers test; SERVERS =
(0, 1) has `world_comm` made with so many servers. After every test all ranks agree that it passed. The rank where one
fails writes its report to its own file and aborts the job: the others would wait for ever. bed.py, in the parent, reads
the files.

A test with three or more parameters (a size, a dtype, a kind...) runs on a part of their product that holds every pair
of values of every two of them. pytest --all runs every size and the whole product. Where some combinations are skipped
or do nothing, a pair might be left to one of these: such a test is marked `whole_product` and runs on all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bed import ALL, FOLDER, OUTSIDE, RANKS, settings
from pairwise import pairwise

if TYPE_CHECKING:
    import mpidl

_INSIDE = FOLDER in os.environ  # the parent loads this file too, when it collects
_communicators: dict[int, mpidl.Communicator] = {}
_mpi_communicators: list[Any] = []
_control: list[Any] = []  # the bed's own duplicate of the world, made when the tests have been collected
_unread: list[str] = []  # why a file could not be collected
_deselected: list[str] = []


def _ranks() -> int:
    return int(os.environ[RANKS])


def _file(kind: str) -> Path:
    return Path(os.environ[FOLDER]) / f"{os.environ['MPIDL_TESTS_RANK']}.{kind}"


def _note(**line: object) -> None:
    with _file("jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _mpi() -> Any:
    from mpidl.mpi import runtime

    return runtime.mpi()


def _agree() -> None:
    """Returns when all ranks are here. It polls and sleeps: waiting ranks leave the cores to the working ones.

    There is no limit here, since the parent has one: it dumps all stacks first, which a rank cannot do for another.
    """
    request = _control[0].Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def _fail(report: str) -> None:
    """Ends the job for all ranks, after a moment in which other failing ranks write their reports too."""
    if not _file("failure").exists():  # the first report says why; what follows from it may come before the end
        _file("failure").write_text(report)
    time.sleep(0.5)
    _mpi().COMM_WORLD.Abort(1)


# ------------------------------------------------------------------------------------------------------- fixtures


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comm" in metafunc.fixturenames:
        ranks = _ranks()
        usual = _usual_sizes(ranks)
        found = [size if isinstance(size, tuple) else (size, 0) for size in getattr(metafunc.module, "SIZES", usual)]
        smaller = max((r for r in settings(Path(metafunc.module.__file__)).ranks if r < ranks), default=0)
        sizes = [size for size in found if smaller < sum(size) <= ranks]  # the smaller launch has the smaller ones
        ids = [f"size{workers}" + (f"-and-{servers}" if servers else "") for workers, servers in sizes]
        metafunc.parametrize("comm", sizes, indirect=True, ids=ids, scope="function")
    if "world_comm" in metafunc.fixturenames and hasattr(metafunc.module, "SERVERS"):
        counts = metafunc.module.SERVERS
        metafunc.parametrize("world_comm", counts, indirect=True, ids=[f"servers{count}" for count in counts])


def _usual_sizes(ranks: int) -> Sequence[int]:
    """One rank alone, an odd number, a power of two, and where there are more than 4 ranks an odd number and all."""
    if os.environ.get(ALL):
        return range(1, ranks + 1) if ranks <= 4 else range(5, ranks + 1)
    return [size for size in (1, 3, 4) if size < ranks] + [ranks] if ranks <= 4 else [5, ranks]


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Iterator[mpidl.Communicator]:
    """A communicator of the first ranks; without servers made once, used by all tests of that size."""
    workers, servers = request.param
    if _mpi().COMM_WORLD.rank >= workers + servers:
        pytest.skip(OUTSIDE)
    yield from _with_servers(_communicator(workers + servers), servers)


@pytest.fixture
def world_comm(request: pytest.FixtureRequest) -> Iterator[mpidl.Communicator]:
    """A communicator of all ranks that do not serve."""
    yield from _with_servers(_communicator(_ranks()), getattr(request, "param", 0))


def _with_servers(whole: mpidl.Communicator, servers: int) -> Iterator[mpidl.Communicator]:
    """Gives the workers their communicator; the last ranks serve meanwhile, as they do in `mpidl.world(servers=k)`."""
    if not servers:
        yield whole
        return
    from mpidl.collectives.communicator import split_servers

    made = split_servers(whole.topology.duplicate("ranks of a test with servers"), servers)
    if made is None:
        pytest.skip(OUTSIDE)
    yield made
    made.free()


def _communicator(size: int) -> mpidl.Communicator:
    if size not in _communicators:
        import mpidl

        world = _mpi().COMM_WORLD
        group = world.group.Incl(range(size))
        _mpi_communicators.append(world.Create_group(group, tag=size))
        group.Free()
        _communicators[size] = mpidl.Communicator(_mpi_communicators[-1])
    return _communicators[size]


@pytest.fixture(params=["node", "active_message", "rma"])
def protocol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the center is held, by the switches that users have."""
    from mpidl.mpi import shared_memory
    from mpidl.parameter_server.center import protocol as protocols

    nodes = set(_communicator(_ranks()).topology.placement.nodes)
    if request.param == "node" and len(nodes) > 1:
        pytest.skip("ranks of several nodes share no memory")
    monkeypatch.setenv(shared_memory.SWITCH, "0" if request.param == "rma" else "1")
    monkeypatch.setenv(protocols.SWITCH, request.param if request.param == "active_message" else "")
    return str(request.param)


# -------------------------------------------------------------------------------------------------------- verdict


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _unread.append(report.longreprtext)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out of each product of parameters what shows no pair of values that another combination does not show."""
    if not _INSIDE or os.environ.get(ALL):
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("whole_product"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    whole = set(items).difference(*tests.values())
    kept = whole.union(*(pairwise(variants, _values) for variants in tests.values()))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _values(item: pytest.Item) -> dict[int, str]:
    """The parameters of a test, one for each `parametrize`: its place -> the name of the value.

    Values that one `parametrize` gives together, a row of its table, are one value here.
    """
    return dict(enumerate(item.callspec._idlist)) if hasattr(item, "callspec") else {}


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.extend(item.nodeid for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """All ranks must be about to run the same tests in the same order."""
    if not _INSIDE:
        return
    _control.append(_mpi().COMM_WORLD.Dup())
    names = "\n".join(item.nodeid for item in session.items)
    hashes = _control[0].allgather(hashlib.sha256(names.encode()).hexdigest())
    if len(set(hashes)) != 1:
        _fail(f"the ranks collected different tests; this one:\n{names}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not _INSIDE:
        return (yield)
    _note(begun=item.nodeid)
    start = time.monotonic()
    result = yield
    _agree()  # a failing rank has aborted by now: whoever returns knows that all passed
    _note(ended=item.nodeid, seconds=round(time.monotonic() - start, 3))
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not _INSIDE:
        return
    if report.failed:
        _note(test=report.nodeid, outcome="failed", why=report.when)
        printed = "\n".join(f"{title}:\n{text}" for title, text in report.sections)
        _fail(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n{printed}")
    elif report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
        why = why.removeprefix("Skipped: ")
        _note(test=report.nodeid, outcome="outside" if why == OUTSIDE else "skipped", why=why)
    elif report.when == "call":
        _note(test=report.nodeid, outcome="passed", why="")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not _INSIDE:
        return
    all_deselected = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _deselected
    if exitstatus != 0 and not all_deselected:  # failed tests never come this far
        _fail("\n".join([f"pytest ended with status {int(exitstatus)} ({pytest.ExitCode(exitstatus).name})", *_unread]))
    for communicator in _communicators.values():
        communicator.free()
    for communicator in [*_mpi_communicators, *_control]:
        communicator.Free()
    _note(exit=0)
