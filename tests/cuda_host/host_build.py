"""Builds csrc/'s CUDA for the host: the same source, in C, against a runtime that is as late as CUDA may be.

There is no GPU where this project is tested: these are the tests of the kernels, the launches and the stream order.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.native.cuda import Cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@functools.cache
def host_library() -> Path:
    """The shared library, built once per process, or per launch of ranks; gcc is there wherever mpidl was built."""
    if "MPIDL_TESTS_FOLDER" in os.environ:
        return _built_by_one(Path(os.environ["MPIDL_TESTS_FOLDER"]))
    folder = Path(tempfile.mkdtemp(prefix="mpidl-cuda-host-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _build(folder / "host.so")


def _built_by_one(folder: Path) -> Path:
    """The rank that comes first builds; the file appears when it is whole."""
    target = folder / "cuda_host.so"
    try:
        os.close(os.open(folder / "cuda_host.begun", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        while not target.exists():
            time.sleep(0.05)
        return target
    return _build(folder / "cuda_host.part.so").rename(target)


def _build(target: Path) -> Path:
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    flags = ["-std=gnu11", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared"]
    sources = ["-x", "c", str(CSRC / "cuda/packing.cu"), str(CSRC / "cuda/memory.c"), str(HERE / "runtime.c")]
    command = [*compiler, *flags, f"-I{HERE}", f"-I{CSRC}", "-o", str(target), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@functools.cache
def host_cuda() -> Cuda:
    """It, loaded."""
    return Cuda(host_library())


class Memory:
    """Bytes on device 0 of the host's CUDA, which the host itself cannot touch: reading them is a fault."""

    def __init__(self, nbytes: int, shift: int = 0) -> None:
        self.address = host_cuda().make("allocate", 0, nbytes + shift + 16) + shift
        self.nbytes = nbytes

    def write(self, data: np.ndarray[Any, Any]) -> None:
        """At once, whatever is under way."""
        assert data.nbytes <= self.nbytes
        assert data.flags.c_contiguous
        peek(self.address, data.ctypes.data, data.nbytes)

    def read(self, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
        """At once, whatever is under way."""
        out = np.empty(self.nbytes, np.uint8)
        peek(out.ctypes.data, self.address, self.nbytes)
        return out.view(dtype)


@functools.cache
def _control() -> ctypes.CDLL:
    return ctypes.CDLL(str(host_library()))


def peek(to: int, source: int, nbytes: int) -> None:
    """Copies at once, even from or to memory of the device."""
    _control().cuda_host_peek(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes))


def finish(stream: int = 0) -> None:
    """Carries out everything on a stream, as a user's synchronisation would."""
    _control().cuda_host_finish(ctypes.c_void_p(stream))


def launches() -> int:
    """Kernels launched so far."""
    return ctypes.c_int64.in_dll(_control(), "cuda_host_launches").value


def allocations() -> int:
    """Allocations of device and pinned memory so far."""
    return ctypes.c_int64.in_dll(_control(), "cuda_host_allocations").value


def copies() -> int:
    """Copies put on streams so far."""
    return ctypes.c_int64.in_dll(_control(), "cuda_host_copies").value


def owns(address: int) -> bool:
    """Whether an address lies in memory of the device."""
    return bool(_control().cuda_host_owns(ctypes.c_void_p(address)))


@contextmanager
def unlocked() -> Iterator[None]:
    """What a kernel of the device's own, torch's or cupy's, may touch."""
    _control().cuda_host_open(1)
    try:
        yield
    finally:
        _control().cuda_host_open(0)


@contextmanager
def shared() -> Iterator[None]:
    """What an MPI that works on the device's memory itself may touch: all of it, any time, in no stream's order."""
    _control().cuda_host_share(1)
    try:
        yield
    finally:
        _control().cuda_host_share(0)
