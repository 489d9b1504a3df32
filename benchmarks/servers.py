"""Exchanges a second of workers with servers of their own, against what the links allow; for nodes with shaped links.

    tests/slurm/cluster.sh --nodes 4 --rate 1gbit -- srun --mpi=pmi2 -N4 python benchmarks/servers.py --servers 2

One rank a node. An exchange of `--count` float32 crosses a worker's link and the servers' links once each way,
so that no more than min(workers, servers) * rate / (4 * count) can be made. Prints one row of a Markdown table.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import mpidl

ROUNDS, WARM_UP = 10, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", type=int, default=1, help="[default: %(default)s]")
    parser.add_argument("--count", type=int, default=2_000_000, help="parameters [default: %(default)s]")
    parser.add_argument("--rate", type=float, default=1.0, help="Gbit/s of a link [default: %(default)s]")
    given = parser.parse_args()
    if given.servers < 1:
        parser.error(f"--servers is {given.servers}; expected 1 or more")
    comm = mpidl.world(servers=given.servers)  # ranks that serve end in here
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(given.count))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    weight.grad = torch.ones_like(weight)
    optimizer = mpidl.Downpour(torch.optim.SGD([weight], lr=1e-3), model, communication_window=1, comm=comm)
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    every = np.array(comm.allgather(np.array(seconds))).reshape(comm.size, -1)[:, WARM_UP:]
    optimizer.finish()
    if comm.rank == 0:
        reached = comm.size * ROUNDS / every.sum(axis=1).max()
        bound = min(comm.size, given.servers) * given.rate * 1e9 / 8 / (4 * given.count)
        cells = (comm.size, given.servers, f"{reached:.2f}", f"{bound:.2f}", f"{reached / bound:.2f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
