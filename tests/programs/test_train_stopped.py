"""Training that ends before its time and goes on: asked by a signal it saves, status 75; killed, little is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import MPIDL, PATIENCE, Result, Running, start_ranks

from mpidl.training.checkpoint import Checkpoint, Store, decode, encode

TINY = Path(__file__).with_name("tiny_job.py")
STOPPED = 75
FOR_EVER = 1_000_000


def start(output: Path, algorithm: str, ranks: int, epochs: int = FOR_EVER, *more: str, step: float = 0.002) -> Running:
    arguments = [str(TINY), "--algorithm", algorithm, "--epochs", str(epochs), "--batch-size", "4"]
    program = [MPIDL, "train", *arguments, "--output", str(output), *more]
    return start_ranks(ranks, program, env={"MPIDL_TEST_STEP": str(step)})


def until(running: Running, there: Callable[[], Any]) -> None:
    while not there():
        assert running.process.poll() is None, running.printed()
        assert running.seconds < 120 * PATIENCE, running.printed()
        time.sleep(0.02)


def until_saved(running: Running, output: Path) -> None:
    until(running, lambda: list(output.glob("checkpoints/0*")))


def ranks_of(running: Running) -> list[int]:
    """The processes that train, not their launchers."""
    found = []
    for pid in running.processes():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # Its name there may be python or python3: pip writes the one by which it was started itself.
        program = Path(os.fsdecode(command[0]))
        if program.parent == Path(sys.executable).parent and program.name.startswith("python") and b"train" in command:
            found.append(pid)
    return found


def rank_of(pid: int) -> int:
    found = dict(word.partition(b"=")[::2] for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return int(next(found[name] for name in (b"OMPI_COMM_WORLD_RANK", b"PMI_RANK") if name in found))


def newest(output: Path, below: str = "") -> Checkpoint:
    found = Store(output / "checkpoints" / below).newest(pytest.fail)
    assert found is not None
    return found


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def check_stopped(output: Path, result: Result) -> None:
    assert result.returncode == STOPPED, result.output
    assert summary(output)["stopped"] is True
    assert summary(output)["epochs_finished"] < FOR_EVER
    assert summary(output)["held_out_loss"] is not None
    assert output / summary(output)["checkpoint"] == newest(output).path


def same(found: Checkpoint, expected: Checkpoint) -> bool:
    """Whether two checkpoints hold the same, but for the time that it took."""
    names = sorted(expected.manifest["files"])
    assert sorted(found.manifest["files"]) == names
    contents = []
    for checkpoint in (found, expected):
        files = {name: decode(checkpoint.read(name)) for name in names if name.endswith(".pt")}
        for file in files.values():
            for name in [name for name in file.get("statistics", {}) if name.startswith("seconds_")]:
                file["statistics"].pop(name)
        contents.append(
            (
                {name: encode(file) for name, file in files.items()},
                checkpoint.read("model.safetensors"),
                checkpoint.manifest["position"],
            )
        )
    return contents[0] == contents[1]


@pytest.mark.any_mpi
def test_a_synchronous_run_stopped_by_sigterm_and_resumed_ends_bit_for_bit_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    running = start(stopped, "synchronous", 2)
    until_saved(running, stopped)
    time.sleep(random.uniform(0, 0.3))  # any step
    os.kill(random.choice(ranks_of(running)), signal.SIGTERM)
    check_stopped(stopped, running.wait(60))
    epochs = summary(stopped)["epochs_finished"] + 2
    result = start(stopped, "synchronous", 2, epochs, "--resume", step=0).wait(120)
    assert result.returncode == 0, result.output
    assert "going on from" in result.stderr
    result = start(whole, "synchronous", 2, epochs, "--resume", step=0).wait(120)
    assert result.returncode == 0, result.output
    assert "training starts anew" in result.stderr
    assert same(newest(stopped), newest(whole))
    assert summary(stopped)["held_out_loss"] == summary(whole)["held_out_loss"]


def test_a_signal_to_the_launcher_stops_all_ranks(tmp_path: Path) -> None:
    running = start(tmp_path, "synchronous", 3, FOR_EVER, "--resume")
    until_saved(running, tmp_path)
    running.process.send_signal(signal.SIGUSR1)
    check_stopped(tmp_path, running.wait(60))


def test_a_signal_to_one_asynchronous_worker_stops_all(tmp_path: Path) -> None:
    running = start(tmp_path, "agn", 3)
    until_saved(running, tmp_path)
    os.kill(ranks_of(running)[1], signal.SIGUSR1)
    check_stopped(tmp_path, running.wait(60))
    assert newest(tmp_path).manifest["clock"] == summary(tmp_path)["commits"]
    for rank in range(3):
        assert newest(tmp_path, f"worker.{rank}").has("local.pt")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_a_server_alone_stops_the_workers(tmp_path: Path, number: signal.Signals) -> None:
    running = start(tmp_path, "agn", 3, FOR_EVER, "--servers", "1")
    until_saved(running, tmp_path)
    (server,) = [pid for pid in ranks_of(running) if rank_of(pid) == 2]
    os.kill(server, number)
    check_stopped(tmp_path, running.wait(60))
    assert (summary(tmp_path)["ranks"], summary(tmp_path)["servers"]) == (2, 1)
    assert newest(tmp_path).manifest["clock"] == summary(tmp_path)["commits"]


def test_killed_again_and_again_while_it_saves_a_run_always_goes_on(tmp_path: Path) -> None:
    """A step takes no time here: most of it goes into checkpoints."""
    store, reached = Store(tmp_path / "checkpoints"), 0
    for blow in ("launcher", "kill"):
        often = ["--checkpoint-every", "0", "--log-every", "1", "--keep", "3"]
        running = start(tmp_path, "synchronous", 2, FOR_EVER, "--resume", *often, step=0)
        until(running, lambda above=reached + 3: max(store.numbers(), default=0) > above)
        time.sleep(random.uniform(0, 0.2))
        ended = running.seconds
        if blow == "launcher":  # Open MPI's gives the ranks 0.2 s
            running.process.send_signal(signal.SIGTERM)
        else:
            os.kill(random.choice(ranks_of(running)), signal.SIGKILL)
        result = running.wait(60)
        assert result.returncode != 0
        assert result.seconds - ended < 30 * PATIENCE
        assert result.left_over == 0
        found = newest(tmp_path)
        assert found.number > reached
        assert found.manifest["position"]["epoch"] < found.number / 2  # most were written within epochs
        assert 3 <= len(store.numbers()) <= 4
        reached = found.number
        assert "refused" not in result.stderr
    running = start(tmp_path, "synchronous", 2, found.manifest["position"]["epoch"] + 1, "--resume", step=0)
    result = running.wait(120)
    assert result.returncode == 0, result.output
    assert f"going on from {found.path}" in result.stderr


def test_killed_workers_leave_a_center_and_their_own_states_to_go_on_from(tmp_path: Path) -> None:
    running = start(tmp_path, "agn", 2)
    until(
        running, lambda: all(list(tmp_path.glob(f"checkpoints/{where}0*")) for where in ("", "worker.0/", "worker.1/"))
    )
    for pid in ranks_of(running):
        os.kill(pid, signal.SIGKILL)
    assert running.wait(60).returncode != 0
    assert not (tmp_path / "summary.json").exists()
    clock = newest(tmp_path).manifest["clock"]
    epochs = 1 + max(newest(tmp_path, f"worker.{rank}").manifest["position"]["epoch"] for rank in range(2))
    result = start(tmp_path, "agn", 2, epochs, "--resume", step=0).wait(120)
    assert result.returncode == 0, result.output
    assert newest(tmp_path).manifest["clock"] > clock
    assert summary(tmp_path)["epochs_finished"] == epochs


def test_a_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    running = start(tmp_path, "synchronous", 2, step=600)  # no step ends
    until(running, (tmp_path / "metrics.jsonl").exists)
    pid = ranks_of(running)[0]
    os.kill(pid, signal.SIGUSR1)
    time.sleep(2)
    assert running.process.poll() is None
    os.kill(pid, signal.SIGTERM)
    result = running.wait(60)
    assert result.returncode not in (0, STOPPED)
    assert result.left_over == 0
    assert "SIGTERM" in result.stderr
