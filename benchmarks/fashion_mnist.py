"""Trains Fashion-MNIST's small CNN with 4 workers by each algorithm, and prints a table in Markdown.

    python benchmarks/fashion_mnist.py
    python benchmarks/fashion_mnist.py --epochs 1 agn downpour

Every run is a command that is printed and could be given by hand. The exit status is 1 if one missed the accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WANTED = 0.88
# Four workers' moves add up, and staleness is a momentum of its own: less of both than one worker could take.
PLAIN = ("--lr", "0.08", "--momentum", "0")
SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of `mpidl train`, and of the job
    "synchronous": ((), ()),
    "downpour": ((), PLAIN),
    "agn": ((), ("--lr", "0.1", "--momentum", "0.5")),
    "dynsgd": ((), ("--lr", "0.1", "--momentum", "0.8")),
    "adag": ((), PLAIN),
    "aeasgd": ((), ("--lr", "0.1", "--momentum", "0.9")),
    "eamsgd": ((), ("--lr", "0.02", "--momentum", "0.9")),
    "dcasgd": ((), PLAIN),
    "gem": ((), ("--lr", "0.01", "--momentum", "0.9")),
    "distbelief": (("--set", "gamma=0.006"), ("--lr", "0.05", "--momentum", "0")),
    "model-averaging": ((), ()),
    "diloco": (("--communication-window", "20", "--set", "outer_lr=0.5"), ()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="[default: %(default)s]")
    parser.add_argument("algorithms", nargs="*", help=f"of {', '.join(SETTINGS)} [default: all]")
    given = parser.parse_args()
    if given.epochs < 1:
        parser.error(f"--epochs is {given.epochs}; expected 1 or more")
    if unknown := set(given.algorithms) - set(SETTINGS):
        parser.error(f"unknown algorithm: {', '.join(sorted(unknown))}; see --help")
    head = ("algorithm", "settings", "test accuracy", "wall seconds", "samples/s", "mean staleness")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    missed = 0
    for name in given.algorithms or SETTINGS:
        ours, job = SETTINGS[name]
        with tempfile.TemporaryDirectory() as folder:
            mpidl = str(Path(sys.executable).with_name("mpidl"))
            train = [mpidl, "train", "jobs/fashion_mnist.py", "--epochs", str(given.epochs), "--batch-size", "32"]
            command = [mpidl, "run", "-n", "4", "--", *train, "--algorithm", name, *ours]
            command += ["--output", folder, "--", *job]
            print(" ".join(command), file=sys.stderr, flush=True)
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            found = json.loads((Path(folder) / "summary.json").read_text())
        missed += found["held_out_accuracy"] < WANTED
        settings, stale = " ".join([*ours, *(("--", *job) if job else ())]), found.get("mean_staleness")
        cells = [
            f"`{name}`",
            f"`{settings}`" if settings else "",
            f"{found['held_out_accuracy']:.4f}",
            f"{found['wall_seconds']:.1f}",
            f"{found['samples_per_second']:,.0f}",
            "" if stale is None else f"{stale:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
