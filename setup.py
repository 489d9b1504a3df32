"""Builds csrc/ into mpidl/_mpidl.so, a plain shared library; metadata and settings stand in pyproject.toml.

Reads CC, CFLAGS and LDFLAGS; MPIDL_WERROR=1 makes a warning an error. Python's headers are not needed, and
the wheel serves every Python 3.
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

SOURCES = ["kernels", "kernels_avx2", "kernels_avx512", "kernels_portable", "packing"]
# One set for all sources; those of an instruction set name it themselves.
FLAGS = [
    *("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-ffp-contract=off",  # every processor gives the same bits
    *("-fno-trapping-math", "-fno-math-errno"),  # or conditionals are not vectorised
]
ADVICE = "apt-get install gcc libc6-dev"


def compiler() -> list[str]:
    """The command that compiles C: $CC, or the first of gcc, cc and clang that is there."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for candidate in [chosen] if chosen else [["gcc"], ["cc"], ["clang"]]:
        if shutil.which(candidate[0]):
            return candidate
    wanted = f"$CC, which is {chosen[0]}, was" if chosen else "gcc, cc and clang were"
    raise SystemExit(f"mpidl's extension needs a C compiler and {wanted} not found: {ADVICE}")


class BuildLibrary(build_ext):
    """One call of the compiler for one shared library that has no Python in it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        strict = ["-Werror"] if os.environ.get("MPIDL_WERROR") == "1" else []
        before, after = (shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS"))
        output = ["-shared", "-o", str(target)]
        command = [*compiler(), *FLAGS, *strict, *before, *output, *ext.sources, *after]
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"mpidl's extension did not compile; C headers missing? {ADVICE}")


class PlatformWheel(bdist_wheel):
    """Any Python 3, no Python ABI, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "mpidl._mpidl",
            sources=[f"csrc/{name}.c" for name in SOURCES],
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
