"""Builds csrc/ into mpidl/native/_mpidl.so, a plain shared library, and where CUDA's nvcc is found its CUDA into
mpidl/native/_mpidl_cuda.so; metadata and settings stand in pyproject.toml.

Reads CC, CFLAGS and LDFLAGS, and CUDA_HOME to find nvcc; MPIDL_WERROR=1 makes a warning an error, MPIDL_CUDA=1 a
missing nvcc, and MPIDL_CUDA=0 builds without CUDA. Python's headers are not needed, and the wheel serves every
Python 3.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = [
    *("csrc/include/headers.c", "csrc/center/center.c", "csrc/packing/gather_range.c", "csrc/packing/packing.c"),
    *("csrc/kernels/avx2.c", "csrc/kernels/avx512.c", "csrc/kernels/dispatch.c", "csrc/kernels/portable.c"),
    *("csrc/node/phases.c", "csrc/node/progress_thread.c", "csrc/node/schedule.c", "csrc/node/store_policy.c"),
]
# One set for all sources; those of an instruction set name it themselves.
FLAGS = [
    *("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Icsrc"),
    '-DMPIDL_HEADERS="csrc/include"',
    "-ffp-contract=off",  # every processor gives the same bits
    *("-fno-trapping-math", "-fno-math-errno"),  # or conditionals are not vectorised
]
ADVICE = "apt-get install gcc libc6-dev"

# The runtime is linked statically: the library loads, and says so, where there is no CUDA. Programs for A100 and H100
# and what is between; newer ones compile the text (PTX) that comes along. All at once, on two cores in half the time.
NVCC_FLAGS = [
    *("-shared", "-O3", "-std=c++17", "-cudart=static", "--threads=0", "-Icsrc"),
    "-fmad=false",  # the same bits as the processor's
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
CUDA = "mpidl.native._mpidl_cuda"
CUDA_SOURCES = ["csrc/cuda/packing.cu", "csrc/cuda/memory.c"]
CUDA_HEADERS = [
    *("csrc/include/mpidl.h", "csrc/include/mpidl_cuda.h", "csrc/kernels/casts.h", "csrc/packing/checks.h"),
    *("csrc/cuda/kernel_bodies.h", "csrc/cuda/kernel_table.h", "csrc/cuda/memory.h", "csrc/cuda/vector_access.h"),
]


def compiler() -> list[str]:
    """The command that compiles C: $CC, or the first of gcc, cc and clang that is there."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for candidate in [chosen] if chosen else [["gcc"], ["cc"], ["clang"]]:
        if shutil.which(candidate[0]):
            return candidate
    wanted = f"$CC, which is {chosen[0]}, was" if chosen else "gcc, cc and clang were"
    raise SystemExit(f"mpidl's extension needs a C compiler and {wanted} not found: {ADVICE}")


def nvcc() -> str | None:
    """Where nvcc is, if CUDA is to be built."""
    wish = os.environ.get("MPIDL_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(
            f"MPIDL_CUDA={wish!r}: expected 1 (build CUDA or fail), 0 (do not) or nothing (if nvcc is there)"
        )
    if wish == "0":
        print("mpidl is built without CUDA: MPIDL_CUDA=0", flush=True)
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if found is None:
        place = f"in CUDA_HOME={home}" if home else "in PATH; CUDA_HOME names CUDA's folder"
        if wish == "1":
            raise SystemExit(f"MPIDL_CUDA=1, but nvcc was not found {place}")
        print(f"mpidl is built without CUDA: nvcc was not found {place}", flush=True)
    return found


class BuildLibrary(build_ext):
    """One call of the compiler for one shared library that has no Python in it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        warnings = os.environ.get("MPIDL_WERROR") == "1"
        if ext.name == CUDA:
            self.build_cuda(ext, target, ["-Werror=all-warnings"] if warnings else [])
            return
        strict = ["-Werror"] if warnings else []
        before, after = (shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS"))
        output = ["-shared", "-o", str(target)]
        command = [*compiler(), *FLAGS, *strict, *before, *output, *ext.sources, *after]
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"mpidl's extension did not compile; C headers missing? {ADVICE}")

    def build_cuda(self, ext: Extension, target: Path, strict: list[str]) -> None:
        """One call of nvcc, which calls a C++ compiler of its own choice."""
        command = [str(NVCC), *NVCC_FLAGS, *strict, "-o", str(target), *ext.sources]
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit("mpidl's CUDA did not compile (a C++ compiler is needed too); MPIDL_CUDA=0 leaves it out")


class PlatformWheel(bdist_wheel):
    """Any Python 3, no Python ABI, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


NVCC = nvcc()
setup(
    ext_modules=[
        Extension(
            "mpidl.native._mpidl",
            sources=SOURCES,
            depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        ),
        *([Extension(CUDA, sources=CUDA_SOURCES, depends=CUDA_HEADERS)] if NVCC else []),
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
