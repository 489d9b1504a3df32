"""setup.py and CUDA's compiler: who decides whether CUDA is built, and what was built in this environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpidl.errors import DeviceError
from mpidl.native import cuda as _cuda

ROOT = Path(__file__).resolve().parents[2]
BUILT = Path(_cuda.__file__).with_name("_mpidl_cuda.so")


@pytest.mark.parametrize(
    ("environ", "status", "words"),
    [
        ({}, 0, "built without CUDA: nvcc was not found in PATH"),
        ({"CUDA_HOME": "/nowhere"}, 0, "nvcc was not found in CUDA_HOME=/nowhere"),
        ({"MPIDL_CUDA": "0"}, 0, "built without CUDA: MPIDL_CUDA=0"),
        ({"MPIDL_CUDA": "1"}, 1, "MPIDL_CUDA=1, but nvcc was not found in PATH"),
        ({"MPIDL_CUDA": "yes"}, 1, "MPIDL_CUDA='yes': expected 1"),
    ],
)
def test_a_missing_nvcc_is_a_line_or_an_error(tmp_path: Path, environ: dict[str, str], status: int, words: str) -> None:
    pytest.importorskip("setuptools", minversion="70.1")
    command = [sys.executable, "setup.py", "--name"]
    empty = {"PATH": str(tmp_path), **environ}
    done = subprocess.run(command, cwd=ROOT, env=empty, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr


def test_the_library_loads_and_without_a_device_says_so() -> None:
    if not BUILT.exists():
        pytest.skip("this mpidl was built without CUDA: nvcc was not found")
    cuda = _cuda.library()
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a device is there: tests/cuda holds what runs on it")
    with pytest.raises(DeviceError, match=r"mpidl_cuda_allocate: .* \(error \d+\)"):
        cuda.make("allocate", 0, 256)
