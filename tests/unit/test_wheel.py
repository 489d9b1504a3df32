"""The source distribution, the wheel built from it, and what becomes of them in other environments."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "csrc",
    "mpidl",
]


def has_build_tools() -> bool:
    """Whether the wheel can be built without fetching setuptools."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) >= (70, 1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without anything built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution, and a wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if has_build_tools() else []
    command = [sys.executable, "-m", "build", *isolation, "--outdir", str(out), str(tree)]
    environ = {**os.environ, "MPIDL_WERROR": "1", "MPIDL_CUDA": "0"}  # nvcc takes its time; test_cuda_build.py
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def run(python: Path | str, code: str, folder: Path) -> str:
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_source_distribution_has_the_c_and_nothing_built(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "LICENSE", "mpidl/__init__.py", "mpidl/_native.py"} <= names
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_serves_every_python_on_this_platform(distributions: tuple[Path, Path]) -> None:
    wheel = distributions[1]
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        metadata = archive.read(record).decode()
    assert "Root-Is-Purelib: false" in metadata
    assert "Tag: py3-none-linux_" in metadata
    assert [name for name in names if name.endswith(".so")] == ["mpidl/_mpidl.so"]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mpidl").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_packs_from_where_it_is_installed(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(distributions[1])], check=True, capture_output=True)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import numpy, mpidl
out = numpy.zeros(3, numpy.float16)
written = mpidl.pack([numpy.arange(3, dtype=numpy.float32)], out)
print(mpidl.__file__, written.sum_of_squares, *out)
"""
    assert run(sys.executable, code, tmp_path) == f"{target}/mpidl/__init__.py 5.0 0.0 1.0 2.0"


def test_an_empty_environment_can_import_it(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    site = run(python, "import sysconfig; print(sysconfig.get_path('platlib'))", tmp_path)
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(site)
    assert run(python, "import mpidl; print(mpidl.__file__)", tmp_path) == f"{site}/mpidl/__init__.py"


@pytest.mark.parametrize(("environ", "words"), [({}, "gcc, cc and clang were"), ({"CC": "absent -m64"}, "absent")])
def test_a_missing_compiler_is_named_with_its_package(
    tree: Path, tmp_path: Path, environ: dict[str, str], words: str
) -> None:
    if not has_build_tools():
        pytest.skip("setuptools 70.1 or newer is not in this environment")
    folder = tmp_path / "tree"
    shutil.copytree(tree, folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    empty = {"PATH": str(tmp_path), **environ}
    done = subprocess.run(command, cwd=folder, env=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert words in last
    assert "apt-get install gcc" in last
