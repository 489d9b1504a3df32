"""MPI on the memory of a device itself: who decides that, and what then comes out. The device is the host's.

The tests of test_devices.py that move data run here once more, with an MPI that touches the device's memory any time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import known
import pytest
import torch
from copies import copied

import mpidl
from mpidl.errors import ArgumentError, MismatchError
from mpidl.mpi import cuda_aware, exit_protocol

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_host"))
from fake import Fake, fake_device
from host_build import allocations, copies, shared
from test_devices import (  # noqa: F401 - run again, with this file's `fake`
    DTYPES,
    placed,
    reduction,
    test_a_request_follows_the_stream_and_its_result_is_not_waited_for,
    test_moves,
    test_one_rank_may_be_on_the_host,
    test_reductions,
    test_strided_arrays,
)

WITH_OTHERS = True
SIZES = (1, 4)
CHILD = Path(__file__).parents[1] / "cuda_host" / "probe_child.py"
Probes = Callable[..., None]


@pytest.fixture
def comm(comm, monkeypatch) -> Iterator[mpidl.Communicator]:
    """One that leaves all data to MPI, as where ranks do not share memory, or some rank asks for direct transfers."""
    with copied(comm, monkeypatch, "MPIDL_SHARED_MEMORY", 0) as copy:
        yield copy


@pytest.fixture
def world_comm(world_comm, monkeypatch) -> Iterator[mpidl.Communicator]:
    """Likewise."""
    with copied(world_comm, monkeypatch, "MPIDL_SHARED_MEMORY", 0) as copy:
        yield copy


@pytest.fixture
def undecided(monkeypatch) -> pytest.MonkeyPatch:
    """Nothing has been decided or tried in this process."""
    monkeypatch.setattr(cuda_aware, "_children", {})
    monkeypatch.setattr(cuda_aware, "_decisions", weakref.WeakKeyDictionary())
    monkeypatch.setattr(cuda_aware, "_said", set())
    return monkeypatch


@pytest.fixture
def fake(undecided) -> Iterator[Fake]:
    """A device whose memory MPI may touch, and which it is trusted with."""
    undecided.setenv("MPIDL_CUDA_AWARE", "1")
    with fake_device() as made, shared():
        yield made


@pytest.fixture
def locked(undecided) -> Iterator[Fake]:
    """A device whose memory only itself may touch: an MPI that did would end the job."""
    with fake_device() as made:
        yield made


@pytest.fixture
def probes(undecided) -> Probes:
    """Says which kind of child tries; see probe_child.py."""

    def choose(kind: str, seconds: float = 60) -> None:
        undecided.setenv("MPIDL_CUDA_AWARE", "auto")
        undecided.setattr(cuda_aware, "_TIME_LIMIT", seconds)
        program = [sys.executable, str(CHILD), kind]
        undecided.setattr(cuda_aware, "_command", lambda device: [*program, device, str(int(seconds))])

    return choose


def staging(comm, device: Fake) -> int:
    """Makes calls of each kind, looks at what came out, and returns how many copies these took."""
    x = placed(device, comm, "float32")
    device.synchronize()
    before = copies()
    results = [comm.allreduce(x), comm.allgather(x), comm.broadcast(x, root=comm.size - 1)]
    device.synchronize()
    made = copies() - before
    inputs = [known.own("torch", "float32", rank, 1001) for rank in range(comm.size)]
    expected = [reduction(comm, "float32", "sum"), torch.stack(inputs), inputs[-1]]
    for result, wanted in zip(results, expected, strict=True):
        known.assert_same(device.read(result), wanted)
    return made


def test_without_a_wish_arrays_are_staged_and_no_child_is_started(comm, locked, undecided):
    undecided.setattr(cuda_aware, "_command", lambda _: pytest.fail("a child was started"))
    undecided.delenv("MPIDL_CUDA_AWARE", raising=False)
    assert staging(comm, locked) == 5
    assert not cuda_aware.direct(comm.topology, "fake:0")


def test_where_a_child_has_shown_it_nothing_is_staged(comm, undecided, probes):
    probes("aware")
    with fake_device() as device, shared():
        allocated = allocations()
        device.empty((1,), torch.float32)
        one = allocations() - allocated
        allocated = allocations()
        assert staging(comm, device) == 0
        assert allocations() - allocated == 3 * one  # x and two results, and no pinned memory
        child = cuda_aware._children["fake:0"]
        assert staging(comm, device) == 0
        assert cuda_aware._children == {"fake:0": child}
    assert cuda_aware.direct(comm.topology, "fake:0")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("refuses", "the child process that tried it ended with status 1"),
        ("lossy", "the child process that tried it ended with status 1"),
        ("unaware", "the child process that tried it was ended by signal 11"),
        ("hangs", "the child process that tried it did not end within"),
    ],
)
def test_where_a_child_has_not_shown_it_all_is_staged(comm, locked, undecided, probes, kind, why):
    lines = []
    undecided.setattr(exit_protocol, "say", lines.append)
    probes(kind, seconds=2 if kind == "hangs" else 60)
    assert staging(comm, locked) == 5
    assert staging(comm, locked) == 5
    assert len(lines) == (comm.rank == 0)
    assert all(why in line for line in lines)
    if kind == "hangs":
        assert cuda_aware._children["fake:0"]._process.poll() == -9


def test_a_child_that_cannot_be_started_is_no_proof(comm, locked, undecided, probes):
    probes("aware")
    undecided.setattr(cuda_aware, "_command", lambda _: ["/nowhere/python"])
    assert staging(comm, locked) == 5


@pytest.mark.parametrize("others", ["refuses", "0"])
def test_where_ranks_disagree_all_is_staged(world_comm, locked, undecided, probes, others):
    probes("refuses")
    if world_comm.rank == 1:
        undecided.setenv("MPIDL_CUDA_AWARE", "1")
    elif others == "0":
        undecided.setenv("MPIDL_CUDA_AWARE", "0")
    assert staging(world_comm, locked) == 5
    reasons = cuda_aware._decisions[world_comm.topology].reasons
    assert "rank 1: MPIDL_CUDA_AWARE=1" in reasons
    assert "ranks 0, 2, 3: " in reasons


def test_a_rank_on_the_host_takes_part_in_the_decision(world_comm, locked, undecided):
    """It has nothing to try; and should its next array be on a device, it must not go to MPI untried."""
    undecided.setenv("MPIDL_CUDA_AWARE", "1")
    data = torch.full((10,), float(world_comm.rank))
    result = world_comm.allreduce(locked.tensor(data) if world_comm.rank else data)
    assert (locked.read(result) if world_comm.rank else result).eq(sum(range(world_comm.size))).all()
    assert staging(world_comm, locked) == 5


def test_a_setting_that_makes_no_sense_is_refused_on_every_rank(comm, locked, undecided):
    undecided.setenv("MPIDL_CUDA_AWARE", "yes" if comm.rank == 0 else "0")
    with pytest.raises(ArgumentError if comm.rank == 0 else MismatchError, match="MPIDL_CUDA_AWARE='yes': expected 0"):
        comm.allreduce(locked.tensor(torch.ones(3)))


def test_a_node_decides_for_itself(comm, fake):
    x = fake.tensor(torch.full((7,), float(comm.rank + 1)))
    whole = comm.allreduce(x)
    part = mpidl.Communicator(comm.topology.data)
    assert fake.read(part.allreduce(whole)).eq(comm.size * sum(range(1, comm.size + 1))).all()
    assert cuda_aware.direct(part.topology, "fake:0")
    part.free()


@pytest.mark.parametrize("dtype", [one for one in DTYPES if one != "int32"])
def test_a_mean_on_the_device_has_the_same_bits(comm, fake, dtype):
    count = 1001
    host = known.own("torch", dtype, comm.rank, count)
    x = fake.tensor(host)
    assert torch.equal(fake.read(comm.allreduce(x, "mean")), comm.allreduce(host, "mean"))
    assert comm.allreduce(x, "mean", out=x) is x
    assert torch.equal(fake.read(x), comm.allreduce(host, "mean"))


def test_what_the_stream_still_reads_is_not_overwritten(comm, fake):
    """The memory into which MPI writes is read by what was put on the stream before."""
    x, seen = fake.tensor(torch.full((64,), float(comm.rank + 1))), fake.tensor(torch.zeros(64))
    mpidl.pack([x], seen)
    comm.broadcast(x, root=comm.size - 1)
    assert fake.read(seen).eq(comm.rank + 1).all()
    assert fake.read(x).eq(comm.size).all()
    y, seen = fake.tensor(torch.ones(64)), fake.tensor(torch.zeros(64))
    mpidl.pack([x], seen)
    comm.allreduce(y, out=x)
    assert fake.read(seen).eq(comm.size).all()


def test_a_child_sees_nothing_of_the_launcher(comm):
    """Or MPI would take it for this rank; what the user set for MPI stays."""
    mine = {**os.environ, "OMPI_MCA_btl": "self", "SLURM_PROCID": "1", "PMIX_RANK": "0"}
    left = cuda_aware.without_launcher(mine)
    assert left["OMPI_MCA_btl"] == "self"
    assert left["PATH"] == os.environ["PATH"]
    gone = {name for name in mine if name not in left}
    assert {"SLURM_PROCID", "PMIX_RANK"} <= gone
    assert gone >= {name for name in mine if name in ("PMI_RANK", "PMI_FD", "OMPI_COMM_WORLD_RANK")}


def test_the_program_of_a_child_starts_mpi_alone_and_looks_for_the_device(world_comm):
    """All others put another program in its place; that one is the same but for the device."""
    done = subprocess.run(
        cuda_aware._command("fake:0"),
        cwd=Path(cuda_aware.__file__).parents[2],
        env=cuda_aware.without_launcher(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ArgumentError: arrays on fake:0 cannot be used: expected cpu or cuda" in done.stderr
    assert "rank 0 of 1 leaves too early" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device: this has never run on hardware")
def test_what_a_child_shows_on_hardware(world_comm, undecided):
    """Whatever it shows, the results are right."""
    undecided.setenv("MPIDL_CUDA_AWARE", "auto")
    values = torch.arange(1000).fmod(7)
    x = values.to(torch.device("cuda", world_comm.rank % torch.cuda.device_count()), torch.float32) * world_comm.rank
    total = world_comm.allreduce(x)
    assert torch.equal(total.cpu(), values * float(sum(range(world_comm.size))))
    assert world_comm.allgather(total.bfloat16())[0].equal(total.bfloat16())


def test_where_some_rank_wants_it_no_memory_is_shared(world_comm, monkeypatch):
    monkeypatch.delenv("MPIDL_SHARED_MEMORY")
    with copied(world_comm, monkeypatch, "MPIDL_CUDA_AWARE", "auto" if world_comm.rank == 1 else "0") as copy:
        assert not copy.shares_memory
        assert copy.allreduce(torch.ones(3)).eq(copy.size).all()
    with copied(world_comm, monkeypatch, "MPIDL_CUDA_AWARE", "0") as copy:
        assert copy.shares_memory == (copy.size > 1)
