"""`mpidl train --resume`: what goes on is what stopped; on as many ranks bit for bit, on others as far as promised."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bed import FOLDER
from copies import copied
from training_helpers import batch, loss_of, mlp

import mpidl
from mpidl.collectives import cost_model
from mpidl.mpi.placement import Link
from mpidl.training import run
from mpidl.training.checkpoint import Draft, Store, decode, decode_tensors
from mpidl.training.refusal import RefusedError
from mpidl.training.settings import Settings
from mpidl.training.stop import StopRequest

JOB = Path(__file__).with_name("noisy_job.py")
WITH_OTHERS = True
ANY_MPI = True
SIZES = (2,)  # others are tried where the number of ranks changes


class StopAt(StopRequest):
    """Asks to stop before the step of that number, counted from 1 in this part of a run."""

    def __init__(self, step: int | None) -> None:
        self.step, self.reads = step, 0

    @property
    def asked(self) -> bool:
        self.reads += 1
        return self.step is not None and self.reads >= self.step


@pytest.fixture
def folder(request):
    return Path(os.environ[FOLDER]) / "runs" / request.node.name


def train(comm, output, stop_at=None, **changed):
    """Trains on `comm`; its last rank is asked to stop. 46 samples: epochs of 12, 6, 4 or 3 steps on 1 to 4 ranks."""
    settings = Settings(job=JOB, output=output, epochs=3, batch_size=4, log_every=2, communication_window=2)
    stop = StopAt(stop_at if comm.rank == comm.size - 1 else None)
    return run.run(replace(settings, **changed), stop, comm)


def noted():
    return sys.modules["mpidl_job_noisy_job"]


def newest(output, below=""):
    found = Store(output / "checkpoints" / below).newest(pytest.fail)
    assert found is not None
    return found


def content(checkpoint):
    """Everything that must be alike in two checkpoints of the same step."""
    found = {name: decode(checkpoint.read(name)) for name in checkpoint.manifest["files"] if name.endswith(".pt")}
    for file in found.values():
        for name in [name for name in file.get("statistics", {}) if name.startswith("seconds_")]:
            file["statistics"].pop(name)
    found["model"] = decode_tensors(checkpoint.read("model.safetensors")) if checkpoint.has("model.safetensors") else {}
    found["place"] = {key: checkpoint.manifest[key] for key in ("position", "steps", "samples", "clock")}
    return found


def assert_equal(found, expected, path=""):
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert set(found) == set(expected), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{path}[{i}]")
    else:
        assert found == expected, path


def summary(output):
    return json.loads((output / "summary.json").read_text())


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ synchronous


def test_a_synchronous_run_that_was_stopped_ends_bit_for_bit_as_if_it_had_not_been(comm, folder):
    changed = {"job_options": ("--sgd",) if comm.size == 3 else ()}
    assert train(comm, folder / "whole", **changed) == 0
    expected = summary(folder / "whole")
    steps = {2: 6, 3: 4}[comm.size]
    for stop_at in (1, steps, steps + 2):  # the last step of an epoch too
        output = folder / f"stopped-{stop_at}"
        assert train(comm, output, stop_at, **changed) == 75
        assert summary(output)["stopped"]
        assert summary(output)["held_out_loss"] is not None
        assert newest(output).manifest["steps"] == stop_at
        comm.barrier()
        assert train(comm, output, resume=True, **changed) == 0
        assert_equal(content(newest(output)), content(newest(folder / "whole")))
        same = ("samples", "steps", "held_out_loss", "held_out_accuracy", "epochs_finished", "stopped", "bytes")
        assert {k: summary(output)[k] for k in same} == {k: expected[k] for k in same}
        assert (summary(output)["resumed"], expected["resumed"]) == (1, 0)


def test_what_was_measured_of_the_link_holds_on(comm, folder, monkeypatch):
    output = folder / "run"
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 1) as nodes:
        measured = nodes.topology.link.as_dict()
        assert train(nodes, output, stop_at=3) == 75
    assert summary(output)["link"] == newest(output).manifest["world"]["link"] == measured
    monkeypatch.setattr(cost_model, "_measured", lambda _: Link(1.0, 1.0))
    with copied(comm, monkeypatch, "MPIDL_NODE_SIZE", 1) as nodes:
        assert nodes.topology.link == Link(1.0, 1.0)
        assert train(nodes, output, resume=True) == 0
    assert summary(output)["link"] == measured


def test_a_sharded_run_and_an_unsharded_one_go_on_from_each_other(comm, folder):
    assert train(comm, folder / "whole") == 0
    for name, first, then in (("sharded", True, True), ("to", False, True), ("from", True, False)):
        assert train(comm, folder / name, 5, shard=first) == 75
        comm.barrier()
        assert train(comm, folder / name, resume=True, shard=then) == 0
        found, expected = content(newest(folder / name)), content(newest(folder / "whole"))
        assert_equal(found["model"], expected["model"])
        assert_equal(found["training.pt"], expected["training.pt"])


def test_sharding_is_refused_where_it_cannot_be(comm, folder):
    with pytest.raises(RefusedError, match="--shard: --algorithm downpour cannot share weights"):
        run.run(Settings(job=JOB, output=folder, algorithm="downpour", shard=True), StopAt(None))


def test_stopped_again_and_again_a_run_ends_the_same(comm, folder):
    if comm.size != 2:
        return
    train(comm, folder / "whole")
    parts = 1
    while train(comm, folder / "parts", 5, resume=True) == 75:
        parts += 1
        comm.barrier()
    assert_equal(content(newest(folder / "parts")), content(newest(folder / "whole")))
    assert summary(folder / "parts")["resumed"] == parts - 1
    whole, found = (records(folder / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [r["step"] for r in found] == sorted({r["step"] for r in found})
    assert sum(r["samples"] for r in found) == sum(r["samples"] for r in whole) == summary(folder / "whole")["samples"]
    losses, expected = (sum(r["loss"] * r["samples"] for r in each) for each in (found, whole))
    assert losses == pytest.approx(expected)
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(found))


def test_a_finished_run_goes_on_to_more_epochs_as_if_they_had_been_asked_for(comm, folder):
    if comm.size != 2:
        return
    train(comm, folder / "whole")
    train(comm, folder / "longer", epochs=2)
    comm.barrier()
    assert train(comm, folder / "longer", resume=True) == 0
    assert_equal(content(newest(folder / "longer")), content(newest(folder / "whole")))
    comm.barrier()
    before = newest(folder / "longer").number
    assert train(comm, folder / "longer", resume=True) == 0  # nothing is left to train
    assert newest(folder / "longer").number == before


def test_checkpoints_within_an_epoch_change_nothing_and_can_be_gone_on_from(comm, folder):
    if comm.size != 2:
        return
    train(comm, folder / "whole")
    train(comm, folder / "often", checkpoint_every=0, keep=99, log_every=1)
    assert_equal(content(newest(folder / "often")), content(newest(folder / "whole")))
    numbers = Store(folder / "often" / "checkpoints").numbers()
    assert len(numbers) > 3 + 3  # besides those at the ends of epochs
    comm.barrier()
    if comm.rank == 0:
        for number in numbers[-5:]:
            shutil.rmtree(folder / "often" / "checkpoints" / f"{number:06d}")
    comm.barrier()
    assert train(comm, folder / "often", resume=True) == 0
    assert_equal(content(newest(folder / "often")), content(newest(folder / "whole")))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(comm, folder, capfd):
    if comm.size != 2:
        return
    train(comm, folder / "whole")
    train(comm, folder / "run", 13)
    comm.barrier()
    for file in ("model.safetensors", "training.pt", "rank.1.pt", "manifest.json"):
        output = folder / file
        if comm.rank == 0:
            shutil.copytree(folder / "run", output)
            raw = bytearray((newest(output).path / file).read_bytes())
            raw[len(raw) // 2] ^= 1
            (output / "checkpoints" / "000003" / file).write_bytes(raw)
        comm.barrier()
        capfd.readouterr()
        assert train(comm, output, resume=True) == 0
        said = capfd.readouterr().err
        assert comm.rank != 0 or f"refused: {output / 'checkpoints' / '000003' / file}" in said
        assert comm.rank != 0 or f"going on from {output / 'checkpoints' / '000002'}" in said
        assert_equal(content(newest(output)), content(newest(folder / "whole")))


@pytest.mark.parametrize("algorithm", ["synchronous", "agn"])
def test_what_cannot_be_written_on_one_rank_leaves_the_checkpoint_before_and_is_said(
    comm, folder, algorithm, monkeypatch, capfd
):
    if comm.size != 2:
        return
    whole, failures = Draft.add, [1]

    def add(draft, name, content):
        if comm.rank == 1 and draft._target.name == "000002" and failures[0]:
            failures[0] -= 1
            raise OSError(28, "No space left on device")
        return whole(draft, name, content)

    monkeypatch.setattr(Draft, "add", add)
    capfd.readouterr()
    assert train(comm, folder / "once", algorithm=algorithm, communication_window=1) == 0
    said = capfd.readouterr().err
    assert comm.rank != (0 if algorithm == "synchronous" else 1) or "No space left on device" in said
    assert newest(folder / "once").manifest["position"]["epoch"] == 3
    failures[0] = 99
    assert train(comm, folder / "always", algorithm=algorithm, communication_window=1) == 1
    assert newest(folder / "always", "" if algorithm == "synchronous" else "worker.1").number == 1
    assert not list(folder.rglob("*.part"))


# ------------------------------------------------------------------------------------------------ another number


@pytest.mark.parametrize(("before", "now"), [(2, 3), (4, 1)])
def test_on_other_ranks_parameters_and_optimizer_are_exact_and_every_sample_comes(world_comm, folder, before, now):
    drawn = np.zeros(46, np.int64)
    for ranks, resume in ((before, False), (now, True)):
        if world_comm.rank < ranks:
            saved = content(newest(folder)) if resume else {}
            with some_ranks(world_comm, ranks) as comm:
                status = train(comm, folder, None if resume else 2, resume=resume, epochs=1)
            assert status == (0 if resume else 75)
            np.add.at(drawn, noted().drawn[4:], 1)  # the loss was tried with four before training
            if resume:
                check_start(saved)
        world_comm.barrier()
    drawn = world_comm.allreduce(drawn)
    assert drawn.min() >= 1, drawn
    assert drawn.sum() - 46 < before + 2 * now, drawn  # shares are filled up to be equal, and cut where no turn is full


@contextmanager
def some_ranks(world_comm, count):
    """The first `count` ranks; only they come here."""
    data = world_comm.topology.data
    group = data.group.Incl(range(count))
    made = data.Create_group(group, tag=count)
    group.Free()
    comm = mpidl.Communicator(made)
    yield comm
    comm.free()
    made.Free()


def check_start(saved):
    """What the first step of a resumed part began from."""
    model, optimizer = noted().seen[0]
    parameters = {name: value for name, value in model.items() if "running" not in name}
    assert_equal(parameters, {name: saved["model"][name] for name in parameters})
    assert_equal(optimizer, saved["training.pt"]["optimizer"])


def test_a_new_rank_draws_other_random_numbers_than_any_old_one_and_the_same_each_time(world_comm, folder):
    with some_ranks(world_comm, 2) if world_comm.rank < 2 else nullcontext() as comm:
        if comm is not None:
            train(comm, folder / "run", 2)
    world_comm.barrier()
    if world_comm.rank == 0:
        shutil.copytree(folder / "run", folder / "again")
    world_comm.barrier()
    for name in ("run", "again"):
        train(world_comm, folder / name, resume=True)
    found = content(newest(folder / "run"))
    assert_equal(found, content(newest(folder / "again")))
    states = [found[f"rank.{rank}.pt"]["random"]["torch"] for rank in range(4)]
    assert not any(torch.equal(states[i], states[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("algorithm", ["model-averaging", "diloco"])
def test_what_averages_now_and_then_goes_on_bit_for_bit_and_on_other_ranks_from_the_average(
    world_comm, folder, algorithm
):
    """Windows of 4 steps, epochs of 6: checkpoints are written in the middle of a window, where ranks differ."""
    changed = {"algorithm": algorithm, "communication_window": 4}
    if world_comm.rank < 3:
        with some_ranks(world_comm, 3) as three:
            if world_comm.rank < 2:
                with some_ranks(world_comm, 2) as comm:
                    train(comm, folder / "whole", **changed)
                    train(comm, folder / "run", epochs=1, **changed)
                    train(comm, folder / "more", epochs=1, **changed)
                    train(comm, folder / "run", resume=True, **changed)
                    assert_equal(content(newest(folder / "run")), content(newest(folder / "whole")))
            three.barrier()
            saved = content(newest(folder / "more"))["model"]
            assert train(three, folder / "more", resume=True, epochs=2, **changed) == 0
            begun = noted().seen[0][0]
            names = [name for name in begun if "running" not in name and "batches" not in name]
            assert_equal({name: begun[name] for name in names}, {name: saved[name] for name in names})
    world_comm.barrier()


# ------------------------------------------------------------------------------------------------- asynchronous


FAMILY = {  # each with a job option that it needs
    **dict.fromkeys(("downpour", "agn", "dynsgd", "adag", "aeasgd"), ()),
    **dict.fromkeys(("eamsgd", "dcasgd", "gem", "distbelief"), ("--sgd",)),
}


@pytest.mark.parametrize("algorithm", FAMILY)
def test_an_asynchronous_run_goes_on_from_the_exact_center_and_clock(comm, folder, algorithm):
    changed = {"algorithm": algorithm, "communication_window": 3, "job_options": FAMILY[algorithm]}
    changed["max_clock_spread"] = 1  # or a worker may have come to its end before another is asked to stop
    assert train(comm, folder, 5, **changed) == 75
    stopped, own = content(newest(folder)), content(worker(folder, comm.rank))
    assert summary(folder)["commits"] == stopped["place"]["clock"] > 0
    comm.barrier()
    assert train(comm, folder, resume=True, **changed) == 0
    assert_equal(noted().seen[0][1], own["local.pt"]["optimizer"])
    begun_from = own["local.pt"]["own"].get("parameters", own["local.pt"]["own"].get("read"))
    names = [name for name in noted().seen[0][0] if "running" not in name and "num_" not in name]
    saved, begun = ([model[name].flatten() for name in names] for model in (stopped["model"], noted().seen[0][0]))
    assert torch.equal(torch.cat(begun), torch.cat(saved) if begun_from is None else begun_from)
    assert summary(folder)["steps"] == 18
    # Each commit took one number, those before the stop included, and none is missing.
    assert summary(folder)["commits"] == newest(folder).manifest["clock"] == sum(summary(folder)["staleness"].values())
    mine = records(folder / f"metrics.{comm.rank}.jsonl")
    assert [r["step"] for r in mine] == sorted({r["step"] for r in mine})
    assert comm.allreduce(np.array([sum(r["samples"] for r in mine)]))[0] == summary(folder)["samples"]


def worker(folder, rank):
    return newest(folder, f"worker.{rank}")


@pytest.mark.parametrize("algorithm", [name for name in FAMILY if name not in ("agn", "aeasgd", "eamsgd")])
def test_one_asynchronous_worker_that_was_stopped_ends_bit_for_bit_as_if_it_had_not_been(world_comm, folder, algorithm):
    """Not the elastic ones: a stop commits the steps that were taken since the exchange that told of it."""
    if world_comm.rank == 0:
        changed = {"algorithm": algorithm, "communication_window": 3, "job_options": FAMILY[algorithm]}
        with some_ranks(world_comm, 1) as comm:
            train(comm, folder / "whole", **changed)
            train(comm, folder / "run", 5, **changed)
            train(comm, folder / "run", resume=True, **changed)
        assert_equal(content(newest(folder / "run")), content(newest(folder / "whole")))
        found, expected = (content(worker(folder / name, 0)) for name in ("run", "whole"))
        for each in (found, expected):
            each["local.pt"]["statistics"].pop("bytes")  # each part's `finish()` pulls
        assert_equal(found, expected)
    world_comm.barrier()


@pytest.mark.parametrize("algorithm", ["downpour", "distbelief"])
def test_a_run_whose_exchanges_overlap_with_local_steps_is_saved_whole(world_comm, folder, algorithm):
    """What is under way when it is saved is in the center, and counted."""
    if world_comm.rank == 0:
        changed = {"algorithm": algorithm, "communication_window": 3, "job_options": FAMILY[algorithm]}
        changed["hyperparameters"] = ("overlap=2",)
        with some_ranks(world_comm, 1) as comm:
            train(comm, folder / "whole", **changed)
            train(comm, folder / "run", 5, **changed)
            stopped, own = content(newest(folder / "run")), content(worker(folder / "run", 0))["local.pt"]["statistics"]
            train(comm, folder / "run", resume=True, **changed)
            train(comm, folder / "often", checkpoint_every=0, keep=99, log_every=1, **changed)
        assert own["commits"] == sum(own["staleness"].values()) == stopped["place"]["clock"] > 0
        saved = folder / "often" / "checkpoints" / "worker.0"
        numbers = Store(saved).numbers()
        assert len(numbers) > 3  # with exchanges under way
        for number in reversed(numbers):
            own = content(worker(folder / "often", 0))["local.pt"]["statistics"]
            assert own["commits"] == sum(own["staleness"].values()) > 0
            shutil.rmtree(saved / f"{number:06d}")
        if algorithm == "downpour":  # whose commits add up to the same, however long the windows are
            found, expected = (content(newest(folder / name))["model"] for name in ("run", "whole"))
            assert_equal(found, expected)
    world_comm.barrier()


@pytest.mark.parametrize("parts", [(2, 4), (3, 1, 3)])
def test_on_another_number_of_workers_no_commit_is_lost(world_comm, folder, parts):
    clock, before = 0, {}
    for number, ranks in enumerate(parts, start=1):
        if world_comm.rank < ranks:
            last = number == len(parts)
            with some_ranks(world_comm, ranks) as comm:
                status = train(comm, folder, None if last else 2, resume=number > 1, algorithm="agn")
            assert status == (0 if last else 75)
            if world_comm.rank in before and number == 2:  # who was there keeps its moments
                assert_equal(noted().seen[0][1]["state"], before[world_comm.rank]["state"])
        world_comm.barrier()
        assert newest(folder).manifest["clock"] > clock
        clock = newest(folder).manifest["clock"]
        before = {rank: content(worker(folder, rank))["local.pt"]["optimizer"] for rank in range(ranks)}
        world_comm.barrier()
    assert summary(folder)["epochs_finished"] == 3
    if parts == (3, 1, 3):  # what worker 1 saved in the first part must not count in the third
        assert list(folder.glob("checkpoints/worker.1/*.aside"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_center_wider_than_the_model_is_restored_exactly(comm, dtype):
    def new(kind, model):
        return kind(torch.optim.SGD(model.parameters(), lr=0.1), model, communication_window=1, comm=comm)

    model = mlp(dtype)
    with new(mpidl.AGN, model) as optimizer:
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step, dtype=dtype)).backward()
            optimizer.step()
    clock, center = optimizer.snapshot()
    assert clock == 4 * comm.size
    assert center.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    resumed = mlp(dtype)
    resumed.load_state_dict(model.state_dict())
    with new(mpidl.Downpour, resumed) as optimizer:
        optimizer.restore(clock, center)
        again, found = optimizer.snapshot()
    assert again == clock
    assert found.tobytes() == center.tobytes()


# --------------------------------------------------------------------------------------------------- refused


def test_other_settings_are_refused_by_name_and_nothing_is_touched(comm, folder, monkeypatch):
    if comm.size != 2:
        return
    train(comm, folder, 5)
    comm.barrier()
    before = sorted((str(f), f.stat().st_mtime_ns) for f in folder.rglob("*"))
    comm.barrier()
    for changed, says in (
        ({"seed": 1}, "--seed was 0"),
        ({"batch_size": 5}, "--batch-size was 4"),
        ({"algorithm": "agn"}, "--algorithm was synchronous"),
        ({"job_options": ("--width", "9")}, "option width was 8"),
        ({"overwrite": True}, "contradict"),
    ):
        with pytest.raises(RefusedError, match=says):
            train(comm, folder, resume=True, **changed)
    with pytest.raises(RefusedError, match="--resume"):
        train(comm, folder)
    more = {"algorithm": "adag", "hyperparameters": ("gamma=0.5",)}
    train(comm, folder / "adag", 5, **more)
    comm.barrier()
    with pytest.raises(RefusedError, match=r"what --set gives was {'gamma': 0\.5} in .*, is {'gamma': 1\.0} now"):
        train(comm, folder / "adag", resume=True, **{**more, "hyperparameters": ("gamma=1",)})
    before = sorted((str(f), f.stat().st_mtime_ns) for f in folder.rglob("*"))
    comm.barrier()
    monkeypatch.setenv("NOISY_GROUPS", "2")  # the job file may have changed
    with pytest.raises(RefusedError, match="parameter group"):
        train(comm, folder, resume=True)
    assert sorted((str(f), f.stat().st_mtime_ns) for f in folder.rglob("*")) == before


def test_without_a_checkpoint_a_run_starts_anew_and_says_so(comm, folder, capfd):
    if comm.size != 2:
        return
    train(comm, folder / "whole")
    if comm.rank == 0:
        (folder / "run" / "checkpoints" / ".000001.part").mkdir(parents=True)  # killed while it wrote its first one
        (folder / "run" / "metrics.jsonl").write_text('{"step": 3}\n')
    comm.barrier()
    assert train(comm, folder / "run", resume=True) == 0
    assert "training starts anew" in capfd.readouterr().err or comm.rank != 0
    assert_equal(content(newest(folder / "run")), content(newest(folder / "whole")))
    assert summary(folder / "run")["resumed"] == 0


def test_where_no_checkpoint_is_whole_nothing_starts(comm, folder):
    if comm.size != 2:
        return
    train(comm, folder, 5)
    comm.barrier()
    if comm.rank == 0:
        for file in folder.glob("checkpoints/*/manifest.json"):
            file.write_text("")
    comm.barrier()
    with pytest.raises(RefusedError, match=r"no checkpoint in .* is whole: .*000001/manifest\.json is damaged"):
        train(comm, folder, resume=True)
