"""README.md's script is run from README.md, by each of the three ways that it shows, with 2 and with 4 ranks."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from launching import WHOLE_TORCH, run_ranks

README = (Path(__file__).parents[2] / "README.md").read_text()
CHOSEN = "optimizer = mpidl.Synchronous(optimizer, model)"


def script() -> str:
    (only,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return only


def test_it_imports_only_mpidl_and_torch_and_is_short():
    tree = ast.parse(script())
    imported = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"mpidl", "torch"}
    assert sum(bool(line.strip()) for line in script().splitlines()) <= 30


def test_the_two_commands_come_first():
    first = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [line.split()[0] for line in first] == ["jobs/quickstart.sh", "tests/run.sh"]


ALL_WAYS = """
import sys
for file in sys.argv[1:]:  # in one process, since importing torch takes longer than training
    print(f"== {file}", flush=True)
    exec(compile(open(file).read(), file, "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_trains_in_each_way(tmp_path, ranks):
    files = []
    for way in ("Synchronous", "Downpour", "AGN"):
        (line,) = re.findall(rf"(optimizer = mpidl\.{way}\(optimizer, model\))", script())
        assert CHOSEN in script()
        program = script().replace(CHOSEN, "pass", 1).replace(f"# {line}", line) if way != "Synchronous" else script()
        files.append(tmp_path / f"{way}.py")
        files[-1].write_text(program)
    (tmp_path / "all.py").write_text(ALL_WAYS)
    env = WHOLE_TORCH if ranks == 2 else {}  # as users have it
    result = run_ranks(ranks, [sys.executable, str(tmp_path / "all.py"), *map(str, files)], timeout=120, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    accuracies = re.findall(rf"^{ranks} ranks: (0\.\d+|1\.000) held-out accuracy", result.stdout, re.MULTILINE)
    assert len(accuracies) == 3, result.stdout
    # Asynchronous runs differ: Downpour with 4 ranks on 2 busy cores ended once at 0.929, mostly at 0.98.
    assert all(float(found) >= least for found, least in zip(accuracies, (0.95, 0.9, 0.9), strict=True)), accuracies
