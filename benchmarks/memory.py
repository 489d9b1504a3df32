"""Memory per rank, one way to train in a launch; without an argument the names of all ways.

mpidl run -n 2 -- python benchmarks/memory.py "mpidl.Synchronous, shard=True"
"""

import sys

import mpidl
from mpidl.cli.bench import memory
from mpidl.cli.bench.ranks import Together

for way in sys.argv[1:]:
    ranks = Together(mpidl.world())
    report = memory.measure(way, ranks)
    if ranks.rank == 0:
        print(report, flush=True)
    ranks.free()
if not sys.argv[1:]:
    print(*memory.WAYS, sep="\n")
