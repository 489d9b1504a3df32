"""Two revisions of mpidl against each other: whole steps, commit and pull, allreduces; one launch each, in turn.

    python benchmarks/revisions.py OLD NEW --rounds 7      # OLD, NEW: folders in which an installed `mpidl/` lies

A folder is made by `pip install --no-deps --target FOLDER CHECKOUT`. Launches alternate, since a machine's speed
drifts; what counts is the ratio of a pair. Each figure is the median of one launch, 2 ranks with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESNET_18 = [(64, 3, 7, 7)] + [(width, width, 3, 3) for width in (64, 128, 256, 512) for _ in range(4)]


def timed(call, times, warm_ups=3):
    """Returns the median of so many calls, in microseconds."""
    found = []
    for number in range(times + warm_ups):
        began = time.perf_counter()
        call()
        if number >= warm_ups:
            found.append(time.perf_counter() - began)
    return statistics.median(found) * 1e6


def steps(torch, model, wrap, batch, times):
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1e-3), model)

    def step():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    microseconds = timed(step, times)
    optimizer.finish()
    return microseconds


def many_tensors(torch):
    """A model with the sizes of ResNet-18's tensors whose forward costs next to nothing."""

    class Many(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(
                [torch.nn.Parameter(torch.randn(shape) * 0.01) for shape in RESNET_18]
            )
            self.biases = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(64)) for _ in range(80)])

        def forward(self, x):
            return sum(w.mean() for w in self.weights) + sum(b.mean() for b in self.biases) + x.mean()

    return Many()


def measure():
    """Runs inside the ranks."""
    import numpy as np
    import torch

    import mpidl

    comm = mpidl.world()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def mlp(width, depth):
        layers = [layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())]
        return torch.nn.Sequential(*layers)

    def agn(optimizer, model):
        return mpidl.AGN(optimizer, model, communication_window=1)

    small, found = torch.randn(32, 256), {}
    found["Synchronous, MLP 4 x 256"] = steps(torch, mlp(256, 4), mpidl.Synchronous, small, 150)
    found["Synchronous, 97 tensors of ResNet-18's sizes"] = steps(
        torch, many_tensors(torch), mpidl.Synchronous, small, 15
    )
    found["AGN, window 1, MLP 4 x 256"] = steps(torch, mlp(256, 4), agn, small, 150)
    found["AGN, window 1, MLP 4 x 1024"] = steps(torch, mlp(1024, 4), agn, torch.randn(8, 1024), 30)
    for name, count, times in (("4 KiB", 1 << 10, 2000), ("256 KiB", 1 << 16, 300), ("16 MiB", 1 << 22, 15)):
        x = np.ones(count, np.float32)
        out = np.empty_like(x)
        found[f"allreduce of {name}"] = timed(lambda x=x, out=out: comm.allreduce(x, out=out), times)
    if comm.rank == 0:
        Path(os.environ["REVISIONS_OUT"]).write_text(json.dumps(found))


def launch(folder):
    """Returns one launch's medians."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "found.json")
        variables = {"PYTHONPATH": folder, "REVISIONS_OUT": str(out), "OMP_NUM_THREADS": "1"}
        command = [
            str(Path(sys.executable).with_name("mpidl")),
            "run",
            "-n",
            "2",
            "--",
            sys.executable,
            __file__,
            "--inside",
        ]
        subprocess.run(
            command, env={**os.environ, **variables}, cwd=scratch, check=True, capture_output=True, timeout=600
        )
        return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return measure()
    if not arguments.new or arguments.rounds < 2:
        parser.error("two folders are needed, and 2 rounds or more")
    pairs = []
    for number in range(arguments.rounds):
        both = [launch(arguments.old), launch(arguments.new)]
        pairs.append(both)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("| what | old, us | new, us | new / old: quartiles |\n|---|---|---|---|")
    for what in pairs[0][0]:
        old, new = ([pair[side][what] for pair in pairs] for side in (0, 1))
        low, middle, high = statistics.quantiles([b / a for a, b in zip(old, new, strict=True)], n=4)
        medians = f"{statistics.median(old):,.0f} | {statistics.median(new):,.0f}"
        print(f"| {what} | {medians} | {low:.2f} {middle:.2f} {high:.2f} |")
    return None


if __name__ == "__main__":
    main()
