"""`mpidl bench` as a user starts it, in its quick form: every benchmark measures, checks, and writes its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import MPIDL, Result, run_ranks

from mpidl.cli.bench.results import read

pytestmark = pytest.mark.any_mpi

CONTENDERS = {
    "import": {"python", "import mpidl"},
    "pack": {"mpidl.pack", "mpidl.unpack", "packing.Table", "memcpy", "torch flatten", "torch.cat", "torch foreach"},
    "allreduce": {"mpidl", "mpidl, out=", "MPI_Allreduce", "gloo", "memcpy"},
    "training": {
        *("mpidl.Synchronous", "mpidl.Synchronous, shard=True", "torch DDP/gloo", "independent trainers"),
        *("allreduce + fused SGD", "reduce + update, shard=True"),
    },
    "parameter-server": {
        *("mpidl commit + pull", "mpidl.Downpour step", "scale + MPI_Accumulate + MPI_Get"),
        *("scale + MPI_Send + MPI_Recv", "scale + torch RPC"),
    },
}


def bench(benchmark: str, ranks: int, output: Path) -> Result:
    return run_ranks(ranks, [MPIDL, "bench", benchmark, "--quick", "--output", str(output)], timeout=240)


@pytest.mark.parametrize(
    ("benchmark", "ranks"), [("import", 1), ("pack", 1), ("allreduce", 2), ("training", 2), ("parameter-server", 2)]
)
def test_quick(benchmark: str, ranks: int, tmp_path: Path) -> None:
    done = bench(benchmark, ranks, tmp_path / "out")
    assert done.returncode == 0, done.output
    (file,) = (tmp_path / "out").glob("*.jsonl")
    result = read(file)
    assert {one.contender for one in result.series} - {"Horovod"} == CONTENDERS[benchmark]
    assert not result.failures
    assert all(len(one.seconds) == 3 and min(one.seconds) > 0 for one in result.series)
    run = result.run
    assert (run["benchmark"], run["ranks"], run["quick"]) == (benchmark, ranks, True)
    assert len(run["cores"]) == len(result.end["preemptions"]) == ranks
    assert {"torch", "gloo", "mpidl"} | ({"mpi", "thread_level"} if ranks > 1 else set()) <= set(run["versions"])
    assert f"mpidl bench {benchmark} --quick" in run["command"]
    for text in (done.stdout, file.with_suffix(".md").read_text()):
        assert "**A quick run: it shows that everything works, and no figure.**" in text
        assert "| **met**" not in text
    cases = list(result.cases)
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"bench {benchmark}: ")]
    assert [line.split("  ")[1] for line in lines] == cases  # plain lines, each once, where there is no terminal
    assert "\x1b" not in done.stderr


def test_an_earlier_result_is_not_overwritten(tmp_path: Path) -> None:
    earlier = tmp_path / "pack.jsonl"
    earlier.write_text(json.dumps({"kind": "run"}))
    done = bench("pack", 1, tmp_path)
    assert done.returncode == 2
    assert "pack.jsonl holds an earlier result" in done.stderr
    assert earlier.read_text() == json.dumps({"kind": "run"})
