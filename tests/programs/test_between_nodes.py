"""One-sided traffic between nodes: it goes on while its target computes, by a progress thread or a polling server."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from launching import PATIENCE, Result, run_ranks

LIMIT = 10.0  # seconds from the leaving of one rank to the end of all


def run_text(text: str, ranks: int, folder: Path, **env: str) -> Result:
    file = folder / "program.py"
    file.write_text(text)
    return run_ranks(ranks, [sys.executable, str(file)], timeout=120, env=env)


# MPICH can be made to treat every rank as a node of its own, over TCP, where a target must help.
APART = {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"}
on_mpich = pytest.mark.skipif(
    Path(sys.executable).with_name("ompi_info").exists(), reason="Open MPI uses shared memory wherever it finds it"
)

OUTSIDE_MPI = """
import sys, time
from pathlib import Path
import numpy as np, mpidl
from mpidl.parameter_server.center.center import Center
comm, done = mpidl.world(servers=int(sys.argv[1])), Path(sys.argv[2])
assert comm.nodes == comm.size
server = Center(comm.topology, np.zeros(1000), "planted", comm.dedicated_servers, protocol=sys.argv[3] or None)
comm.barrier()
deadline = time.monotonic() + 30
if comm.rank == 0:
    for _ in range(10):
        server.commit(np.ones(1000))
    done.touch()
while not done.exists() and time.monotonic() < deadline:
    time.sleep(0.01)  # rank 1 computes, and makes no MPI call
if comm.rank == 1:
    print("commits landed meanwhile:", done.exists(), flush=True)
comm.barrier()
out = np.empty(1000)
assert server.pull(out) == 10 and (out == 10).all()
comm.barrier()
server.close()
"""


@on_mpich
@pytest.mark.parametrize("protocol", ["active_message", "rma", ""])  # the last: whichever a trial finds faster
@pytest.mark.parametrize("servers", [0, 1])
def test_commits_from_other_nodes_land_while_a_rank_computes(tmp_path: Path, servers: int, protocol: str) -> None:
    """Rank 1 holds a shard, which its progress thread lets MPI serve; or a server holds all, and polls."""
    file = tmp_path / "program.py"
    file.write_text(OUTSIDE_MPI)
    program = [sys.executable, str(file), str(servers), str(tmp_path / "done"), protocol]
    result = run_ranks(2 + servers, program, timeout=120, env=APART)
    assert result.returncode == 0, result.output
    assert "commits landed meanwhile: True" in result.stdout, result.output
    assert "was not matched" not in result.output  # a message that nobody took in before MPI ended
    assert ("mpidl: the center is reached by " in result.stderr) == (protocol == ""), result.output


ONE_BY_ONE = """
import time, mpidl
time.sleep(0.3 * mpidl.world().rank)
"""


@on_mpich
def test_ranks_that_leave_one_by_one_take_in_each_others_last_words(tmp_path: Path) -> None:
    result = run_text(ONE_BY_ONE, 3, tmp_path, **APART)
    assert result.returncode == 0, result.output
    assert "was not matched" not in result.output


WAITING = """
import os, time, signal, mpidl
comm = mpidl.world()
if comm.rank == 1:
    time.sleep(30)
elif os.fork() == 0:
    time.sleep(2)
    os.kill(os.getppid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_waits_for_the_others_to_leave_hears_signals(tmp_path: Path) -> None:
    result = run_text(WAITING, 2, tmp_path)
    assert result.returncode != 0
    assert "rank 0 of 2 leaves too early (SIGTERM" in result.stderr, result.output
    assert result.seconds < 20 * PATIENCE


ENDS_MPI = """
import sys, mpidl
from mpi4py import MPI
comm = mpidl.world()
comm.barrier()
if sys.argv[1] == "all" or comm.rank == 0:
    MPI.Finalize()
print("ended", flush=True)
"""


@pytest.mark.parametrize("who", ["all", "one"])
def test_a_program_may_end_mpi_itself(tmp_path: Path, who: str) -> None:
    file = tmp_path / "program.py"
    file.write_text(ENDS_MPI)
    result = run_ranks(2, [sys.executable, str(file), who], timeout=60)
    assert result.returncode == 0, result.output
    assert result.stdout.count("ended") == 2


FEWER_THREADS = """
import mpi4py
mpi4py.rc.thread_level = "serialized"
from mpi4py import MPI
import threading, numpy as np, mpidl
from mpidl.parameter_server.center.center import Center
comm = mpidl.world()
for _ in range(2):
    server = Center(comm.topology, np.zeros(1000), "planted")
    assert threading.active_count() == 1
    server.close()
"""


def test_without_threads_in_mpi_there_is_no_progress_thread_and_it_is_said_once(tmp_path: Path) -> None:
    result = run_text(FEWER_THREADS, 2, tmp_path, MPIDL_NODE_SIZE="1")
    assert result.returncode == 0, result.output
    assert result.stderr.count("mpidl: MPI was started with thread level 'serialized': there is no progress") == 1


FAILS = """
import sys, time, numpy as np, mpidl
from mpidl.parameter_server.center.center import Center
comm = mpidl.world()
server = Center(comm.topology, np.zeros(1000), "planted")
assert server._progress is not None
comm.barrier()
print(f"leaving at {time.time():.2f}", flush=True)
if comm.rank == 1:
    raise RuntimeError("planted reason")
comm.barrier()
"""


def test_a_helper_thread_outlives_no_failure(tmp_path: Path) -> None:
    result = run_text(FAILS, 2, tmp_path, MPIDL_NODE_SIZE="1")
    ended = time.time()
    assert result.returncode != 0
    assert "RuntimeError: planted reason" in result.stderr
    assert "rank 1 of 2 leaves too early (RuntimeError: planted reason" in result.stderr, result.output
    assert "Fatal Python error" not in result.output
    assert ended - float(re.findall(r"leaving at (\d+\.\d+)", result.stdout)[0]) < LIMIT
    assert result.left_over == 0
