"""The AVX-512 kernels on any processor: their source, with the instructions in plain C (tests/avx512, by SIMDe)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HEADERS = HERE.parent / "avx512"
CSRC = HERE.parents[1] / "csrc"
SIMDE = Path("/usr/include/simde/x86/avx512.h")

pytestmark = pytest.mark.skipif(not SIMDE.exists(), reason=f"{SIMDE} is missing: apt-get install libsimde-dev")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the extension, built so that it takes AVX-512 to be supported."""
    target = tmp_path_factory.mktemp("avx512") / "emulated.so"
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    same_bits = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    headers = [f"-I{HEADERS}", f"-I{CSRC}", "-include", str(HEADERS / "supported.h")]
    sources = [*map(str, sorted(CSRC.glob("kernels/*.c"))), str(CSRC / "packing/packing.c")]
    sources += [f'-DMPIDL_HEADERS="{CSRC / "include"}"', str(CSRC / "include/headers.c")]
    command = ["gcc", *flags, *same_bits, *headers, "-o", str(target), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize(
    ("file", "fewest"),
    [("test_instructions.py", 70), ("test_packing.py", 100), ("test_native.py", 40)],
)
def test_the_tests_of_packing_pass_on_it(library: Path, file: str, fewest: int) -> None:
    paths = os.pathsep.join([str(HEADERS), os.environ.get("PYTHONPATH", "")])
    chosen = {"MPIDL_TEST_LIBRARY": str(library), "MPIDL_INSTRUCTIONS": "avx512", "PYTHONPATH": paths}
    # The tests of the choice itself start processes, which have the installed library; other sets are tested with it.
    left_out = "not environment_chooses and not [portable and not [avx2"
    command = ["-m", "pytest", "-q", "-p", "emulated", "-k", left_out, str(HERE / file)]
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **chosen}, cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not run avx512" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= fewest, done.stdout
