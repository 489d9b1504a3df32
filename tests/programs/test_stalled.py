"""A rank that never comes: those who wait raise one text that names it, and it is aborted when they leave."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from launching import PATIENCE, Result, run_ranks


def run_text(text: str, ranks: int, folder: Path, **env: str) -> Result:
    file = folder / "program.py"
    file.write_text(text)
    return run_ranks(ranks, [sys.executable, str(file)], timeout=60, env=env)


NEVER_COMES = """
import time, numpy as np, mpidl
comm = mpidl.world()
comm.barrier()
if comm.rank == 1:
    time.sleep(100)
try:
    comm.allreduce(np.ones(3))
except TimeoutError as error:
    print(f"rank {comm.rank} got: {error}", flush=True)
    try:
        comm.barrier()
    except mpidl.ClosedError as error:
        print(f"rank {comm.rank} then: {error}", flush=True)
    SLEEP
    RAISE
"""


def test_all_who_wait_raise_one_text_and_the_missing_rank_is_aborted(tmp_path: Path) -> None:
    text = NEVER_COMES.replace("RAISE", "raise error").replace("SLEEP", "time.sleep(0.5)")
    result = run_text(text, 4, tmp_path, MPIDL_TIMEOUT="2")
    assert not result.timed_out
    assert result.seconds < 20 * PATIENCE
    assert result.returncode != 0
    assert result.left_over == 0
    said = re.findall(r"rank (\d) got: (.*)", result.stdout)
    assert sorted(rank for rank, _ in said) == ["0", "2", "3"], result.output
    texts = {why for _, why in said}
    assert len(texts) == 1
    expected = r"allreduce \(call \d+ on world\) cannot complete, after 2 s: rank 1 is not in any call of mpidl"
    assert re.fullmatch(expected, texts.pop()), result.output
    assert result.stdout.count("then: world takes no further calls: allreduce") == 3


def test_who_swallows_the_error_still_fails_the_job(tmp_path: Path) -> None:
    text = NEVER_COMES.replace("RAISE", "pass").replace("SLEEP", "pass")
    result = run_text(text, 2, tmp_path, MPIDL_TIMEOUT="1")
    assert not result.timed_out
    assert result.returncode != 0
    assert re.search(r"still open: allreduce \(call \d+ on world\) was given up half-way", result.stderr), result.output


LATE = """
import time, numpy as np, mpidl
comm = mpidl.world()
comm.barrier()
if comm.rank == 1:
    time.sleep(3.5)
try:
    comm.allreduce(np.ones(3))
    print(f"rank {comm.rank} got a result", flush=True)
except mpidl.StalledError as error:
    print(f"rank {comm.rank} got: {error}", flush=True)
    time.sleep(2.5)  # time for the late one to come and to hear of it
    raise
"""


def test_a_rank_that_comes_too_late_gets_the_same_text(tmp_path: Path) -> None:
    result = run_text(LATE, 3, tmp_path, MPIDL_TIMEOUT="1")
    assert result.returncode != 0
    said = re.findall(r"rank (\d) got: (.*)", result.stdout)
    assert sorted(rank for rank, _ in said) == ["0", "1", "2"], result.output
    assert len({why for _, why in said}) == 1


ELSEWHERE = """
import numpy as np, mpidl
comm = mpidl.world()
other = mpidl.Communicator(comm.topology.data)
try:
    (other if comm.rank == 1 else comm).barrier()  # a program that crosses its calls
except mpidl.StalledError as error:
    print(f"rank {comm.rank} got: {error}", flush=True)
    import time
    time.sleep(1)
    raise
"""


def test_a_rank_that_waits_elsewhere_is_said_to(tmp_path: Path) -> None:
    result = run_text(ELSEWHERE, 3, tmp_path, MPIDL_TIMEOUT="2")
    assert result.returncode != 0
    said = dict(re.findall(r"rank (\d) got: (.*)", result.stdout))
    assert said["0"] == said["2"], result.output
    assert "rank 1 waits in barrier (call" in said["0"]


INTERRUPTED = """
import os, signal, threading, time, numpy as np, mpidl
comm = mpidl.world()
comm.barrier()
if comm.rank == 1:
    time.sleep(1.5)
else:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    x = np.ones(100_000)
    request = comm.iallreduce(x)
    try:
        request.wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    del x, request
    try:
        comm.allreduce(np.ones(3))
    except mpidl.ClosedError as error:
        print("then:", error, flush=True)
"""


def test_after_an_interrupted_wait_nothing_goes_on_by_halves(tmp_path: Path) -> None:
    result = run_text(INTERRUPTED, 2, tmp_path)
    assert "interrupted\nthen: world takes no further calls: " in result.stdout, result.output
    assert result.returncode != 0
