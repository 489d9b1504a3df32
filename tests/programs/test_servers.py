"""`mpidl.world(servers=k)` as programs use it: workers train, servers end quietly with them, nobody is left behind."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import MPIDL, PATIENCE, Result, run_ranks, start_ranks

TOP = Path(__file__).parents[2]
LEAVER = Path(__file__).with_name("leaving") / "leaver.py"
TINY = Path(__file__).with_name("tiny_job.py")
LIMIT = 10.0 * PATIENCE  # seconds from the leaving of one rank to the end of all


def run_text(text: str, ranks: int, folder: Path, **env: str) -> Result:
    file = folder / "program.py"
    file.write_text(text)
    return run_ranks(ranks, [sys.executable, str(file)], timeout=120, env=env)


def test_the_script_of_the_readme_trains_with_a_server(tmp_path: Path) -> None:
    """Only the first line and the choice of the optimizer differ; the sampler's line stays right."""
    (text,) = re.findall(r"```python\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    for old, new in (
        ("mpidl.world()", "mpidl.world(servers=1)"),
        ("optimizer = mpidl.Synchronous(optimizer, model)", "optimizer = mpidl.AGN(optimizer, model)"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    result = run_text(text, 3, tmp_path)
    assert result.returncode == 0, result.output
    (accuracy,) = re.findall(r"^2 ranks: (0\.\d+|1\.000) held-out accuracy$", result.stdout, re.MULTILINE)
    assert float(accuracy) >= 0.95
    assert "mpidl" not in result.stderr, result.output


REFUSED = """
from pathlib import Path
import mpidl
from mpidl.mpi import runtime
rank = runtime.mpi().COMM_WORLD.rank
said = Path(__file__).with_name(f"{rank}.txt").open("w", buffering=1)
for servers in (3, -1, True, 1.0, "1", rank):
    try:
        mpidl.world(servers=servers)
    except (mpidl.ArgumentError, mpidl.MismatchError) as error:
        said.write(f"{type(error).__name__} {error}\\n")
try:
    comm = mpidl.world(servers=1)
except SystemExit:
    try:
        mpidl.world()
    except mpidl.ClosedError as error:
        said.write(f"{error}\\n")
    raise
assert mpidl.world() is comm and mpidl.world(servers=1) is comm
try:
    mpidl.world(servers=0)
except mpidl.ArgumentError as error:
    said.write(f"later: {error}\\n")
"""


def test_what_cannot_be_is_refused_alike_and_can_be_corrected(tmp_path: Path) -> None:
    result = run_text(REFUSED, 3, tmp_path)
    assert result.returncode == 0, result.output
    expected = "expected a whole number from 0 to 2, so that of 3 rank(s) one at least works"
    alike = [f"ArgumentError servers={text}: {expected}" for text in ("3", "-1", "True", "1.0", "'1'")]
    alike.append("MismatchError world: servers differs between ranks: rank 0: 0; rank 1: 1; rank 2: 2")
    later = "later: servers=0: mpidl.world() was called before, with servers=1"
    ended = "world: this rank served, and its workers have ended"
    for rank, more in enumerate(([later], [later], [ended])):
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == alike + more


IDLE = """
import atexit, os, time
import numpy as np, mpidl
from mpidl.mpi import runtime
sleep, asleep = time.sleep, 0.0

def counted(seconds):
    global asleep
    began = time.monotonic()
    sleep(seconds)
    asleep += time.monotonic() - began

runtime.mpi()
say = lambda text: os.write(1, f"{text}\\n".encode())  # whole lines, whoever else speaks
atexit.register(lambda: say(f"a rank ends, asleep for {asleep:.3f} s"))
time.sleep = counted
comm = mpidl.world(servers=2)
say(f"worker {comm.rank} of {comm.size}, {comm.servers} servers, sum {comm.allreduce(np.ones(1))[0]:g}")
sleep(3 * comm.rank)
say(f"worker {comm.rank} is done")
"""


def test_servers_that_nobody_uses_sleep_and_end_with_the_last_worker(tmp_path: Path) -> None:
    """Not CPU time is held to a bound, since that depends on who else computes: they sleep in the 3 s of waiting."""
    result = run_text(IDLE, 4, tmp_path)
    assert result.returncode == 0, result.output
    assert result.stderr.strip() == "", result.output
    lines = result.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("worker")) == [
        "worker 0 is done",
        "worker 0 of 2, 2 servers, sum 2",
        "worker 1 is done",
        "worker 1 of 2, 2 servers, sum 2",
    ]
    after = "\n".join(lines[lines.index("worker 1 is done") :])  # the last worker ends, and then the servers
    asleep = [float(x) for x in re.findall(r"asleep for ([\d.]+)", after)]
    assert len(asleep) == 3, result.output
    assert sum(seconds > 1.5 for seconds in asleep) == 2, asleep  # the two servers


# ------------------------------------------------------------------------------------------------------- leaving


def run_leaver(how: str) -> Result:
    result = run_ranks(3, [sys.executable, str(LEAVER), "served", how], timeout=120)
    ended = time.time()
    left = re.search(r"leaving at ([\d.]+)", result.output)
    assert left, result.output
    assert ended - float(left[1]) < LIMIT, result.output
    assert not result.timed_out
    assert result.returncode != 0, result.output
    assert result.left_over == 0
    return result


GONE = r"rank {} has died: process \d+ is gone|BAD TERMINATION|exited on\s+signal"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exception", r"(?s)Traceback .*RuntimeError: planted reason"),
        ("exit-0", r"rank 1 of 3 leaves too early \(still open: the window the clock of planted"),
        ("sigkill", GONE.format(1)),
    ],
)
def test_a_worker_that_leaves_ends_servers_and_workers(how: str, says: str) -> None:
    result = run_leaver(how)
    assert re.search(says, result.output), result.output


@pytest.mark.parametrize(("name", "reason"), [("SIGTERM", "SIGTERM"), ("SIGINT", "KeyboardInterrupt"), ("SIGKILL", "")])
def test_a_server_that_dies_ends_the_workers(name: str, reason: str) -> None:
    result = run_leaver(f"server-{name}")
    early = rf"rank 2 of 3 leaves too early \({reason}; still open: the serving of 2 worker\(s\)"
    assert re.search(early if reason else GONE.format(2), result.output), result.output


STOPPED_SERVER = """
import os, signal, time, numpy as np, mpidl
from mpidl.parameter_server.center.center import Center
comm = mpidl.world(servers=1)
if comm.rank == 0:
    os.kill(comm.dedicated_servers.whole.placement.processes[2].pid, signal.SIGSTOP)
comm.barrier()
try:
    Center(comm.topology, np.zeros(3), "planted", comm.dedicated_servers)
except mpidl.StalledError as error:
    print(f"rank {comm.rank} got: {error}", flush=True)
    time.sleep(0.5)
    raise
"""


def test_a_server_that_no_longer_answers_is_named(tmp_path: Path) -> None:
    result = run_text(STOPPED_SERVER, 3, tmp_path, MPIDL_TIMEOUT="2")
    assert not result.timed_out
    assert result.returncode != 0
    assert result.left_over == 0
    said = re.findall(r"rank (\d) got: (.*)", result.stdout)
    assert sorted(rank for rank, _ in said) == ["0", "1"], result.output
    (text,) = {why for _, why in said}
    assert text.endswith("cannot complete, after 2 s: rank 2 is not in any call of mpidl"), text


def test_ctrl_c_ends_workers_and_servers(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(
        "import time, mpidl\ncomm = mpidl.world(servers=1)\ncomm.barrier()\n"
        "if comm.rank == 0:\n    print('working', flush=True)\ntime.sleep(100)\n"
    )
    running = start_ranks(3, [sys.executable, str(file)])
    while "working" not in running.printed():
        assert running.process.poll() is None, running.printed()
        assert running.seconds < 100 * PATIENCE, running.printed()
        time.sleep(0.05)
    running.process.send_signal(signal.SIGINT)
    asked = running.seconds
    result = running.wait(60)
    assert result.returncode != 0
    assert result.seconds - asked < LIMIT
    assert result.left_over == 0


# ---------------------------------------------------------------------------------------------------- mpidl train


def summary(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return content


def test_mpidl_train_with_a_server_and_resume(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--algorithm", "downpour", "--servers", "1", "--batch-size", "6", "--output", str(output)]
    program = [MPIDL, "train", str(TINY), *arguments]
    for epochs, more in ((1, []), (2, ["--resume"])):
        result = run_ranks(3, [*program, "--epochs", str(epochs), *more], timeout=120)
        assert result.returncode == 0, result.output
        found = summary(output)
        assert (found["ranks"], found["servers"], found["held_out_samples"]) == (2, 1, 8)
        assert found["samples"] == epochs * 64
        assert sum(found["staleness"].values()) == found["commits"] == epochs * 4  # 2 x 6 steps, windows of 3
        manifest = json.loads((output / found["checkpoint"] / "manifest.json").read_text())
        assert manifest["clock"] == epochs * 4  # went on from where it was
        assert manifest["world"]["ranks"] == 2
    names = sorted(entry.name for entry in output.iterdir())
    assert names == ["checkpoints", "metrics.0.jsonl", "metrics.1.jsonl", "summary.json"]


def test_servers_of_the_synchronous_way_are_refused_by_name(tmp_path: Path) -> None:
    program = [MPIDL, "train", str(TINY), "--servers", "1", "--output", str(tmp_path / "x")]
    refused = run_ranks(2, program, timeout=120)
    assert refused.returncode == 2, refused.output
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("mpidl: ")]
    assert line.startswith("mpidl: --servers 1: --algorithm synchronous has no parameter server")
    assert not (tmp_path / "x").exists()


def test_a_stop_on_request_keeps_its_status(tmp_path: Path) -> None:
    """The launcher passes the signal on to all ranks: the server goes on serving while the workers save."""
    arguments = ["--algorithm", "agn", "--servers", "1", "--epochs", "100000", "--output", str(tmp_path)]
    running = start_ranks(3, [MPIDL, "train", str(TINY), *arguments])
    while not list(tmp_path.glob("checkpoints/0*")):
        assert running.process.poll() is None, running.printed()
        assert running.seconds < 120 * PATIENCE, running.printed()
        time.sleep(0.05)
    running.process.send_signal(signal.SIGUSR1)
    result = running.wait(60)
    assert result.returncode == 75, result.output
    assert summary(tmp_path)["stopped"] is True
