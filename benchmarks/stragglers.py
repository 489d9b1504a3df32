"""Seconds to an accuracy on held-out digits, with equal workers and with one that takes ten times as long for a step.

    mpidl run -n 4 -- python benchmarks/stragglers.py
    mpidl run -n 4 -- python benchmarks/stragglers.py --repeats 1 Synchronous AGN

Prints two tables in Markdown: seconds by algorithm, and what equal workers did: commits of each, staleness of all.
The slow worker sleeps for what its steps take longer: it leaves its core to the others.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mpidl

ALGORITHMS = ("Synchronous", "Downpour", "AGN", "DynSGD", "ADAG", "AEASGD", "EAMSGD", "DCASGD", "GEM", "DistBelief")
WANTED, BATCH, EVERY, SLOWER = 0.95, 32, 20, 10  # accuracy; samples; steps between two looks; times
LONGEST = 60.0  # seconds of a run
DIGITS = runpy.run_path(str(Path(__file__).parents[1] / "jobs" / "digits.py"))
DIGITS["options"].__dict__.update(lr=0.07, momentum=0.5, channels=16)


class Run:
    """One training run of all ranks, up to the accuracy or the time limit."""

    def __init__(self, comm: mpidl.Communicator, name: str, slower: float, seed: int) -> None:
        self.comm, self.slower = comm, slower
        torch.manual_seed(seed)
        self.model, self.center_model = DIGITS["model"](), DIGITS["model"]()
        self.train, self.held_out = (DIGITS["data"](train).tensors for train in (True, False))
        self.draw = torch.Generator().manual_seed(1000 * seed + comm.rank)
        inner = DIGITS["optimizer"](self.model.parameters())
        self.optimizer: Any = getattr(mpidl, name)(inner, self.model, comm=comm)
        self.asynchronous = hasattr(self.optimizer, "center")

    def go(self) -> float:
        """Trains; returns seconds to the accuracy, infinite if it was not reached, of training only."""
        self.comm.barrier()
        started, looking, reached, steps = time.monotonic(), 0.0, float("inf"), 0
        while True:
            self.step()
            steps += 1
            if steps % EVERY == 0 and (self.comm.rank == 0 or not self.asynchronous):
                before = time.monotonic()
                good = self.accuracy() >= WANTED
                looking += time.monotonic() - before
                seconds = before - started - (looking - (time.monotonic() - before))
                if good and reached == float("inf"):
                    reached = seconds
                if self.is_over(good or seconds > LONGEST):
                    break
            elif self.asynchronous and self.optimizer.stopping:
                break
        self.optimizer.finish()
        return reached

    def is_over(self, wish: bool) -> bool:
        if self.asynchronous:
            if wish:
                self.optimizer.request_stop()
            return bool(self.optimizer.stopping)
        return bool(self.comm.allreduce(torch.tensor([float(wish)]), "max").item())

    def step(self) -> None:
        before = time.monotonic()
        chosen = torch.randint(len(self.train[0]), (BATCH,), generator=self.draw)
        self.optimizer.zero_grad()
        DIGITS["loss"](self.model, [one[chosen] for one in self.train]).backward()
        if self.comm.rank == self.comm.size - 1:
            time.sleep((self.slower - 1) * (time.monotonic() - before))
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        model = self.model
        if self.asynchronous:
            model = self.center_model
            for name, values in self.optimizer.center()[1].items():
                model.get_parameter(name).copy_(values)
        return float(DIGITS["accuracy"](model, list(self.held_out)))


def staleness_of(runs: list[Counter[int]]) -> str:
    """The 50th and 95th percentile, and the largest."""
    all_of_them = sum(runs, Counter())
    if not all_of_them:
        return ""
    values = np.repeat(*map(np.array, zip(*sorted(all_of_them.items()), strict=True)))
    return f"{np.percentile(values, 50):.0f}, {np.percentile(values, 95):.0f}, {values.max()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", default=ALGORITHMS, help="names of mpidl's classes [default: all]")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the median counts [default: %(default)s]")
    given = parser.parse_args()
    if unknown := sorted(set(given.algorithms) - set(ALGORITHMS)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(ALGORITHMS)}")
    if given.repeats < 1:
        parser.error(f"--repeats must be at least 1, found {given.repeats}")
    torch.set_num_threads(1)
    comm, said, counts = mpidl.world(), [], []
    for name in given.algorithms:
        seconds: dict[float, list[float]] = {1: [], SLOWER: []}
        commits, staleness = np.zeros(comm.size, np.int64), Counter[int]()
        for seed in range(given.repeats):
            for slower in (1, SLOWER):
                run = Run(comm, name, slower, seed)
                seconds[slower].append(run.go())
                if slower == 1 and run.asynchronous:
                    commits += np.ravel(comm.allgather(np.array([run.optimizer.statistics.commits])))
                    staleness += run.optimizer.statistics.staleness
        equal, slow = (statistics.median(seconds[slower]) for slower in (1, SLOWER))
        said.append(f"| `{name}` | {equal:.2f} | {slow:.2f} | {slow / equal:.1f} |")
        counts.append(f"| `{name}` | {', '.join(map(str, commits))} | {staleness_of([staleness])} |")
        if comm.rank == 0:
            print(said[-1], flush=True)
    if comm.rank == 0:
        print(f"\n| algorithm | s to {WANTED}, equal | with one {SLOWER} times slower | ratio |\n|---|---|---|---|")
        print(*said, sep="\n")
        print("\n| algorithm | commits of each worker | staleness on rank 0: p50, p95, max |\n|---|---|---|")
        print(*counts, sep="\n")


if __name__ == "__main__":
    main()
