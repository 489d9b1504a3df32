"""A commit and its pull of one center by all ranks at once, by each protocol in turn; for ranks of several nodes.

    tests/slurm/cluster.sh --rate 10gbit -- srun --mpi=pmi2 -N2 --ntasks-per-node=1 python benchmarks/center.py

Every rank holds a shard. Prints each launch's protocols with the median and the range of the slowest rank's times.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

import mpidl
from mpidl.parameter_server.center.center import Center

PROTOCOLS = ("active_message", "rma")


def exchanges(comm: mpidl.Communicator, protocol: str, count: int, rounds: int) -> list[float]:
    """Returns the seconds of each round, of the slowest rank; the center is checked at the end."""
    ranks = comm.topology.duplicate("benchmarks/center.py")
    server = Center(ranks, np.zeros(count, np.float32), "a benchmark", protocol=protocol)
    ones, out, seconds = np.ones(count, np.float32), np.empty(count, np.float32), []
    for _ in range(rounds + 1):  # the first one warms up
        ranks.barrier("a round")
        started = time.perf_counter()
        server.commit_and_pull(ones, out)
        seconds.append(time.perf_counter() - started)
    ranks.barrier("the end")
    server.pull(out)
    assert (out == comm.size * (rounds + 1)).all()
    server.close()
    ranks.free()
    return list(np.max(comm.allgather(np.array(seconds)), axis=0)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000, help="float32 elements [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[default: %(default)s]")
    given = parser.parse_args()
    if given.count < 1 or given.rounds < 1:
        parser.error("--count and --rounds are 1 or more")
    comm = mpidl.world()
    for protocol in PROTOCOLS * 2:
        seconds = [1e3 * one for one in exchanges(comm, protocol, given.count, given.rounds)]
        if comm.rank == 0:
            found = f"{statistics.median(seconds):.0f} ms ({min(seconds):.0f} - {max(seconds):.0f})"
            print(f"{comm.size} ranks on {comm.nodes} node(s), {given.count} float32, {protocol}: {found}", flush=True)


if __name__ == "__main__":
    main()
