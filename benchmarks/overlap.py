"""What a step of asynchronous training costs more than a local step: with exchanges that the worker waits for, and with
exchanges that overlap with the next local step (`overlap`).

    tests/slurm/cluster.sh --rate 1gbit -- srun --mpi=pmi2 -N2 --ntasks-per-node=1 python benchmarks/overlap.py

Local steps alone, then each way, round after round; a step is the median of a round's. Prints the median and the
quartiles over the rounds, of the slowest rank, and what a worker waits for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import mpidl

WIDTH = 1600  # of four square layers: 10.2 M parameters
WAYS: dict[str, Callable[..., torch.optim.Optimizer] | None] = {
    "local steps alone": None,
    "Downpour": partial(mpidl.Downpour, communication_window=1),
    "Downpour, overlap=1": partial(mpidl.Downpour, communication_window=1, overlap=1),
    "DistBelief": mpidl.DistBelief,
    "DistBelief, overlap=1": partial(mpidl.DistBelief, overlap=1),
}


def step_seconds(way: str, steps: int, batch: int) -> float:
    """Returns the median seconds of a step of this rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    inner = torch.optim.SGD(model.parameters(), lr=1e-4)
    wrap = WAYS[way]
    optimizer = inner if wrap is None else wrap(inner, model)
    x, seconds = torch.randn(batch, WIDTH), []
    for _ in range(steps + 1):  # the first one warms up
        started = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    if isinstance(optimizer, mpidl.Downpour | mpidl.DistBelief):
        optimizer.finish()
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="[default: %(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="of a round, each way [default: %(default)s]")
    parser.add_argument("--batch", type=int, default=256, help="samples [default: %(default)s]")
    given = parser.parse_args()
    if min(given.rounds, given.steps, given.batch) < 1:
        parser.error("--rounds, --steps and --batch are 1 or more")
    comm = mpidl.world()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way, seconds in found.items():
            mine = np.array([1e3 * step_seconds(way, given.steps, given.batch)])
            seconds.append(float(comm.allreduce(mine, op="max")[0]))
    if comm.rank == 0:
        threads = torch.get_num_threads()
        print(f"{comm.size} ranks on {comm.nodes} node(s), torch threads {threads}, milliseconds a step:")
        for way, seconds in found.items():
            low, middle, high = np.percentile(seconds, [25, 50, 75])
            print(f"  {way}: {middle:.0f} ({low:.0f} - {high:.0f})")
        alone = statistics.median(found["local steps alone"])
        for name in ("Downpour", "DistBelief"):
            waited, hidden = (statistics.median(found[way]) for way in (name, f"{name}, overlap=1"))
            print(f"  {name}: {waited - alone:.0f} ms waited for, {hidden - alone:.0f} with overlap=1")


if __name__ == "__main__":
    main()
