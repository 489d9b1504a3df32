"""One rank leaves, in every way there is: all ranks end within 10 s, the reason is printed, the job has failed.

What a rank does is in leaving/leaver.py. A clean end must be quiet.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from launching import PATIENCE, Result, run_ranks

FOLDER = Path(__file__).with_name("leaving")
LIMIT = 10.0 * PATIENCE  # seconds from the leaving of one rank to the end of all

HAS_LEFT = "rank 1 has left: its program ended before this call"
UNFINISHED = r"rank 1 of \d leaves too early .*finish\(\) was never called"
# Of a rank that was killed either the others speak, or the launcher is quicker.
GONE = r"rank 1 has died: process \d+ is gone|BAD TERMINATION|exited on\s+signal"
SAYS_WITHOUT_MPIDL = {
    "exception": r"(?s)Traceback .*RuntimeError: planted reason",
    "exit-text": "planted text",
    "keyboard-interrupt": "KeyboardInterrupt",
    "sigterm": "SIGTERM",
    "os-exit-0": r"rank 1 of \d calls os._exit\(0\) in \S+leaver.py:\d+: ending the job",
    "os-exit-3": r"rank 1 of \d calls os._exit\(3\) in \S+leaver.py:\d+: ending the job",
    "sigkill": GONE,
}
EXITS = ("exit-3", "exit-0", "console-script")


def run_leaver(where: str, how: str, ranks: int) -> Result:
    result = run_ranks(ranks, [sys.executable, str(FOLDER / "leaver.py"), where, how], timeout=60)
    ended = time.time()
    left = re.search(r"leaving at ([\d.]+)", result.output)
    assert left, result.output
    assert ended - float(left[1]) < LIMIT, result.output
    assert not result.timed_out
    assert result.returncode != 0, result.output
    assert result.left_over == 0
    return result


@pytest.mark.parametrize("how", [*SAYS_WITHOUT_MPIDL, *EXITS])
def test_with_nothing_open_while_the_others_wait_in_a_collective(how: str) -> None:
    result = run_leaver("plain", how, 3 if how in ("exception", "exit-0", "sigkill") else 2)
    assert re.search(SAYS_WITHOUT_MPIDL.get(how, HAS_LEFT), result.output), result.output
    if how in EXITS or how == "exit-text":
        stalled = rf"StalledError: allreduce \(call \d+ on world\) cannot complete: {HAS_LEFT}"
        assert re.search(stalled, result.output), result.output


# Ranks that import torch take seconds to start: most ways are tried above.
TRAINING = ("exception", "exit-0", "sigkill")


@pytest.mark.parametrize("how", [*TRAINING, "autograd-hook", "data-loader-worker"])
def test_while_the_others_wait_in_a_synchronous_step(how: str) -> None:
    result = run_leaver("synchronous", how, 2)
    expected = SAYS_WITHOUT_MPIDL.get(how, UNFINISHED if how in EXITS else SAYS_WITHOUT_MPIDL["exception"])
    assert re.search(expected, result.output), result.output
    if not how.startswith(("os-exit", "sigkill")):
        assert re.search(UNFINISHED, result.output), result.output


@pytest.mark.parametrize("how", ["exception", "exit-0", "sigterm", "sigkill"])
def test_while_the_others_train_asynchronously(how: str) -> None:
    result = run_leaver("downpour", how, 2)
    assert re.search(SAYS_WITHOUT_MPIDL.get(how, UNFINISHED), result.output), result.output


def test_while_the_others_are_in_a_constructor() -> None:
    result = run_leaver("constructor", "exit-0", 2)
    assert HAS_LEFT in result.output, result.output


def test_a_failed_thread_fails_the_next_step_on_every_rank() -> None:
    result = run_leaver("synchronous", "thread", 3)
    reason = "RankFailedError: the step was not taken, rank 1: thread planted: RuntimeError: planted reason"
    assert sorted(re.findall(rf"rank (\d) got {re.escape(reason)}", result.output)) == ["0", "1", "2"], result.output


def test_a_failed_thread_ends_an_asynchronous_worker() -> None:
    result = run_leaver("downpour", "thread", 2)
    reason = "RankFailedError: rank 1: thread planted: RuntimeError: planted reason"
    assert reason in result.output, result.output


def run_text(text: str, ranks: int, folder: Path, **env: str) -> Result:
    """Runs a program written out here."""
    file = folder / "program.py"
    file.write_text(text)
    return run_ranks(ranks, [sys.executable, str(file)], timeout=60, env=env)


CLEAN = """
import time, torch, numpy as np, mpidl
comm = mpidl.world()
own = mpidl.Communicator(comm.topology.data)
comm.allreduce(np.ones(3))
model = torch.nn.Linear(2, 1)
with mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model) as optimizer:
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 2) + comm.rank).mean().backward()
        optimizer.step()
with mpidl.Downpour(torch.optim.SGD(model.parameters(), lr=0.1), model) as optimizer:
    for _ in range(7):
        optimizer.zero_grad()
        model(torch.ones(4, 2) + comm.rank).mean().backward()
        optimizer.step()
if comm.rank == 0:
    own.node.barrier() if own.node.size == 1 else None
else:
    time.sleep(1.5)  # the others have ended
    if comm.rank == 1:
        mpidl.Communicator(mpidl.mpi.runtime.mpi().COMM_SELF).allreduce(np.ones(3))
print("rank %d is done" % comm.rank, flush=True)
"""


def test_a_clean_program_leaves_quietly_also_when_ranks_end_at_different_times(tmp_path: Path) -> None:
    result = run_text(CLEAN, 3, tmp_path)
    assert result.returncode == 0, result.output
    assert sorted(re.findall(r"rank (\d) is done", result.stdout)) == ["0", "1", "2"]
    assert not re.sub(r"rank \d is done|\n", "", result.stdout)  # the launcher may mix the ranks' ends of lines
    assert "mpidl" not in result.stderr
    assert "Traceback" not in result.stderr


UNFINISHED_PROGRAM = """
import torch, mpidl
model = torch.nn.Linear(2, 1)
optimizer = mpidl.{name}(torch.optim.SGD(model.parameters(), lr=0.1), model)
print("the program ended normally", flush=True)
"""


@pytest.mark.parametrize("name", ["Synchronous", "Downpour"])
def test_an_optimizer_that_was_never_finished_is_named(name: str, tmp_path: Path) -> None:
    result = run_text(UNFINISHED_PROGRAM.format(name=name), 2, tmp_path)
    assert result.returncode != 0
    assert "the program ended normally" in result.stdout
    assert f"mpidl.{name}: its finish() was never called" in result.stderr


SHARDED = """
import atexit, os, sys, torch, mpidl
model = torch.nn.Linear(20, 10)
kept = []
def at_the_very_end():
    assert kept and all(v.isfinite().all() for v in [*kept, *model.parameters()])
    os.write(1, b"read after the end\\n")
atexit.register(at_the_very_end)
optimizer = mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model, shard=True)
kept.append(model.weight.detach())
address = model.weight.data_ptr()
model(torch.ones(4, 20)).mean().backward()
optimizer.step()
if sys.argv[1:] == ["finish"]:
    optimizer.finish()
    assert model.weight.data_ptr() != address
"""


@pytest.mark.parametrize("finish", [True, False])
def test_shared_weights_can_be_read_to_the_very_end(finish: bool, tmp_path: Path) -> None:
    """Neither `finish()` nor an exit without it may leave a parameter in memory that is gone."""
    file = tmp_path / "program.py"
    file.write_text(SHARDED)
    result = run_ranks(2, [sys.executable, str(file), *["finish"] * finish], timeout=60)
    if finish:
        assert result.returncode == 0, result.output
        assert result.stdout.count("read after the end") == 2, result.output
    else:
        assert result.returncode != 0
        assert "mpidl.Synchronous: its finish() was never called" in result.stderr, result.output
    assert "egmentation" not in result.output and "bus error" not in result.output.lower()


REQUEST_LEFT = """
import numpy as np, mpidl
comm = mpidl.world()
if comm.rank == 0:
    comm.iallreduce(np.ones(3))
else:
    comm.barrier()
"""


def test_a_request_left_open_is_named(tmp_path: Path) -> None:
    result = run_text(REQUEST_LEFT, 2, tmp_path)
    assert result.returncode != 0
    assert "a call of iallreduce on world" in result.stderr, result.output


THREAD_ALIVE = """
import threading, time, numpy as np, mpidl
comm = mpidl.world()
comm.barrier()
if comm.rank == 1:
    threading.Thread(target=time.sleep, args=(60,)).start()  # the interpreter would wait for it before it exits
    time.sleep(0.3)
    raise RuntimeError("planted reason")
comm.barrier()
"""


def test_a_thread_that_still_runs_keeps_nobody_waiting(tmp_path: Path) -> None:
    result = run_text(THREAD_ALIVE, 2, tmp_path)
    assert result.returncode != 0
    assert not result.timed_out
    assert "RuntimeError: planted reason" in result.stderr


FORKED = """
import os, sys, numpy as np, mpidl, torch
comm = mpidl.world()
model = torch.nn.Linear(2, 1)
optimizer = mpidl.Downpour(torch.optim.SGD(model.parameters(), lr=0.1), model, communication_window=1)
child = os.fork()
if child == 0:
    calls = (mpidl.world, lambda: comm.allreduce(np.ones(1)), lambda: mpidl.Communicator(None), optimizer.step)
    for call in calls:
        try:
            call()
        except mpidl.ForkedError as error:
            print("refused:", error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
comm.barrier()
assert optimizer.center()[0] == 0  # the child has committed nothing
optimizer.finish()
"""


def test_a_forked_child_is_refused_and_its_end_is_nobody_s_end(tmp_path: Path) -> None:
    result = run_text(FORKED, 2, tmp_path)
    assert result.returncode == 0, result.output
    assert result.stdout.count("refused: process") == 8, result.output
    assert "mpidl:" not in result.stderr
