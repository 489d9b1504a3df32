"""What mpidl is to reach: two ranks on two idle cores, medians of ratios in one run. The table stands here only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KIB, MIB = 2**10, 2**20


def size_text(nbytes: int) -> str:
    """Returns a size in the unit in which it is a whole number."""
    return f"{nbytes // MIB} MiB" if nbytes % MIB == 0 else f"{nbytes // KIB} KiB"


@dataclass(frozen=True)
class Target:
    """A figure to reach, in every case of a benchmark whose parameters fit `where`."""

    benchmark: str
    name: str
    contender: str
    peer: str
    # 'speed': peer's seconds / contender's; 'time': the reverse; 'excess': of both over `baseline`; 'seconds': those
    # that the contender takes more than the peer
    quantity: str
    relation: str  # '>=' | '<='
    bound: float
    where: Mapping[str, Any] = field(default_factory=dict)  # parameter -> value, or (lowest, highest)
    baseline: str = ""
    yardstick: str = ""  # not empty: the peer is the faster one of two MPIs, each in its own run, compared by this

    def fits(self, parameters: Mapping[str, Any]) -> bool:
        """Returns whether a case with these parameters is meant."""
        known = {"nodes": 1, **parameters}  # what says nothing of nodes ran on one
        return all(_fits(known.get(name), wanted) for name, wanted in self.where.items())


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return value is not None and bool(wanted[0] <= value <= wanted[1])
    return bool(value == wanted)


# Contenders, as the benchmarks call them.
OURS, FRESH, WINDOW = "mpidl, out=", "mpidl", "mpidl, in the window"
MPI, GLOO, MEMCPY = "MPI_Allreduce", "gloo", "memcpy"
BY, NARROW, EXCHANGE = "mpidl by {}", "mpidl by direct, bfloat16", "raw exchange"  # between nodes
PACK, TABLE = "mpidl.pack", "packing.Table"
UNPACK, FLATTEN, CAT, FOREACH = "mpidl.unpack", "torch flatten", "torch.cat", "torch foreach"
SYNCHRONOUS, SHARDED, DDP, HOROVOD = "mpidl.Synchronous", "mpidl.Synchronous, shard=True", "torch DDP/gloo", "Horovod"
INDEPENDENT = "independent trainers"
REDUCE_UPDATE, SHARDED_UPDATE = "allreduce + fused SGD", "reduce + update, shard=True"
PYTHON, IMPORT = "python", "import mpidl"
SERVER, DOWNPOUR, ONE_SIDED = "mpidl commit + pull", "mpidl.Downpour step", "scale + MPI_Accumulate + MPI_Get"
MASTER, RPC = "scale + MPI_Send + MPI_Recv", "scale + torch RPC"


_COMMITS = {"count": 25_000_000, "master": False}
_ONE_NODE, _TWO_NODES = {"nodes": 1}, {"nodes": 2, "nbytes": (16 * MIB, 64 * MIB), "place": "out of place"}
_SMALL = {"nbytes": (0, 4 * KIB)} | _ONE_NODE
_LARGE = {"nbytes": (64 * MIB, 256 * MIB)} | _ONE_NODE
_64_KIB = {"nbytes": 64 * KIB} | _ONE_NODE
_DIRECT = BY.format("direct")


def _in_place(nbytes: int) -> dict[str, Any]:
    """gloo knows no other way."""
    return {"nbytes": nbytes, "place": "in place"} | _ONE_NODE


_BIG_PACK = {"direction": "pack", "tensors": 161}

TARGETS = (
    Target("allreduce", "allreduce, 64 KiB", OURS, MPI, "speed", ">=", 1.5, _64_KIB, yardstick=MEMCPY),
    Target(
        "allreduce",
        "allreduce, 256 KiB - 16 MiB",
        OURS,
        MPI,
        "speed",
        ">=",
        2.5,
        {"nbytes": (256 * KIB, 16 * MIB)} | _ONE_NODE,
        yardstick=MEMCPY,
    ),
    Target("allreduce", "allreduce, 64 - 256 MiB", OURS, MPI, "speed", ">=", 3.5, _LARGE, yardstick=MEMCPY),
    Target("allreduce", "gradients in the window", WINDOW, MPI, "speed", ">=", 7.0, _LARGE, yardstick=MEMCPY),
    Target("allreduce", "allreduce, up to 4 KiB, checked", OURS, MPI, "speed", ">=", 0.75, _SMALL, yardstick=MEMCPY),
    Target("allreduce", "allreduce in memcpys, 64 - 256 MiB", OURS, MEMCPY, "time", "<=", 1.5, _LARGE),
    Target("allreduce", "allreduce against gloo, 4 KiB", OURS, GLOO, "speed", ">=", 20.0, _in_place(4 * KIB)),
    Target("allreduce", "allreduce against gloo, 32 MiB", OURS, GLOO, "speed", ">=", 5.0, _in_place(32 * MIB)),
    # 0.88 of the link's rate, where TCP itself reaches 0.94 of it.
    Target("allreduce", "two nodes, of a raw exchange", OURS, EXCHANGE, "speed", ">=", 0.94, _TWO_NODES),
    Target("allreduce", "bfloat16 on the wire", NARROW, _DIRECT, "speed", ">=", 1.8, _TWO_NODES),
    Target("pack", "pack, 25 M floats", PACK, MEMCPY, "speed", ">=", 0.95, _BIG_PACK | {"dtype": "float32"}),
    Target("pack", "the same by a table", TABLE, MEMCPY, "speed", ">=", 0.95, _BIG_PACK | {"dtype": "float32"}),
    Target("pack", "pack to bfloat16", PACK, MEMCPY, "speed", ">=", 1.2, _BIG_PACK | {"dtype": "bfloat16"}),
    Target("pack", "to bfloat16 by a table", TABLE, MEMCPY, "speed", ">=", 1.2, _BIG_PACK | {"dtype": "bfloat16"}),
    Target("training", "excess of a step over none", SYNCHRONOUS, DDP, "excess", "<=", 0.25, baseline=INDEPENDENT),
    Target("training", "sharded step", SHARDED, INDEPENDENT, "time", "<=", 1.0, {"model": "resnet18"}),
    Target("training", "sharded step", SHARDED, INDEPENDENT, "time", "<=", 1.08, {"model": "mlp"}),
    Target("training", "sharded reduce + update", SHARDED_UPDATE, REDUCE_UPDATE, "speed", ">=", 1.7),
    Target("parameter-server", "commit + pull", SERVER, ONE_SIDED, "speed", ">=", 1.5, _COMMITS),
    Target("import", "import over python's start", IMPORT, PYTHON, "seconds", "<=", 0.15),
)
