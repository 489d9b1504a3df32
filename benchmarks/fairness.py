"""How evenly equal workers are served that do nothing but exchange: commits of each, and the staleness of rank 0's.

    mpidl run -n 4 -- python benchmarks/fairness.py --seconds 10

Prints one row of a Markdown table. `MPIDL_SHARED_MEMORY=0` shows MPI's service in the place of shared memory's.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import mpidl


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="[default: %(default)s]")
    parser.add_argument("--count", type=int, default=1_000_000, help="parameters [default: %(default)s]")
    given = parser.parse_args()
    if not given.seconds > 0 or given.count < 1:
        parser.error(f"--seconds {given.seconds:g} and --count {given.count}: expected more than 0 of both")
    comm = mpidl.world()
    model = torch.nn.Linear(given.count, 1, bias=False)
    optimizer = mpidl.Downpour(torch.optim.SGD(model.parameters(), lr=1e-9), model, communication_window=1, comm=comm)
    model.weight.grad = torch.zeros_like(model.weight)
    comm.barrier()
    end = time.monotonic() + given.seconds
    while time.monotonic() < end:
        optimizer.step()
    statistics = optimizer.statistics
    commits = np.array(comm.allgather(np.array([statistics.commits]))).ravel()
    optimizer.finish()
    if comm.rank == 0:
        spread = (commits.max() - commits.min()) / commits.mean()
        cells = (comm.size, ", ".join(map(str, commits)), f"{100 * spread:.1f} %", f"{statistics.mean_staleness:.2f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
