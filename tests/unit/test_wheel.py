"""The source distribution, the wheel built from it, and what becomes of them in other environments."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
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


# Stands for a compiler that has done it before, and in the same words.
COPIES = """
import shutil, sys
shutil.copyfile({!r}, sys.argv[sys.argv.index("-o") + 1])
"""


@pytest.fixture(scope="module")
def cuda_wheel(tree: Path, distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built where nvcc is found, once: nvcc takes its time. The C in it is that of the other wheel."""
    home = os.environ.get("CUDA_HOME")
    if shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) is None:
        pytest.skip("nvcc was not found: no wheel with CUDA can be built")
    if not has_build_tools():
        pytest.skip("setuptools 70.1 or newer is not in this environment")
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copytree(tree, folder / "tree")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "tree"),
    ]
    with zipfile.ZipFile(distributions[1]) as archive:
        library = archive.extract("mpidl/native/_mpidl.so", folder)
    copies = folder / "copies.py"
    copies.write_text(COPIES.format(library))
    compiler = shlex.join([sys.executable, str(copies)])
    environ = {**os.environ, "MPIDL_WERROR": "1", "MPIDL_CUDA": "1", "CC": compiler}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(python: Path | str, code: str, folder: Path) -> str:
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_source_distribution_has_the_c_and_nothing_built(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "LICENSE", "mpidl/__init__.py", "mpidl/native/library.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= names
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
    assert [name for name in names if name.endswith(".so")] == ["mpidl/native/_mpidl.so"]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mpidl").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def installed(wheel: Path, target: Path) -> str:
    """Installs the wheel into a folder; returns the lines that make Python take it from there."""
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    return f"import sys\nsys.path.insert(0, {str(target)!r})\n"


def test_the_wheel_packs_from_where_it_is_installed(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    code = """
import numpy, mpidl
out = numpy.zeros(3, numpy.float16)
written = mpidl.pack([numpy.arange(3, dtype=numpy.float32)], out)
print(mpidl.__file__, written.sum_of_squares, *out)
"""
    found = run(sys.executable, installed(distributions[1], target) + code, tmp_path)
    assert found == f"{target}/mpidl/__init__.py 5.0 0.0 1.0 2.0"


def test_a_wheel_built_with_cuda_has_its_library(cuda_wheel: Path) -> None:
    assert "-py3-none-linux_" in cuda_wheel.name
    with zipfile.ZipFile(cuda_wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
    assert libraries == {"mpidl/native/_mpidl.so", "mpidl/native/_mpidl_cuda.so"}


def test_a_wheel_built_with_cuda_finds_its_library_where_it_is_installed(cuda_wheel: Path, tmp_path: Path) -> None:
    """It loads from there, and answers: with a device, or by CUDA's own words that there is none."""
    target = tmp_path / "site"
    code = """
from mpidl.native import cuda as _cuda
from mpidl.errors import DeviceError
cuda = _cuda.library()
(line,) = {line.split()[-1] for line in open("/proc/self/maps") if "_mpidl_cuda" in line}
try:
    answer = cuda.make("allocate", 0, 256) > 0
except DeviceError as error:
    answer = "CUDA failed in mpidl_cuda_allocate: " in str(error)
print(line, answer)
"""
    found = run(sys.executable, installed(cuda_wheel, target) + code, tmp_path)
    assert found == f"{target}/mpidl/native/_mpidl_cuda.so True"


def test_a_wheel_built_without_cuda_says_so(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    code = """
from mpidl.native import cuda as _cuda
from mpidl.errors import ExtensionError
try:
    _cuda.library()
except ExtensionError as error:
    print(error)
"""
    found = run(sys.executable, installed(distributions[1], tmp_path / "site") + code, tmp_path)
    assert found.startswith("mpidl was built without CUDA, so arrays on a device cannot be used: install mpidl again")


SCRIPT = """
import mpidl
def train(optimizer: mpidl.Synchronous) -> None:
    reveal_type(optimizer.statistics.steps)
mpidl.world().no_such_method()
"""


def test_a_type_checker_sees_the_installed_package(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """`py.typed` is in the wheel; without it the package would be Any, and a wrong name no error."""
    pytest.importorskip("mypy")
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "mpidl" / "py.typed").exists()
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir=cache", "--config-file=mypy.ini", "script.py"]
    environ = {**os.environ, "MYPYPATH": ""}
    python = _site_python(tmp_path)
    done = subprocess.run(
        [*command, f"--python-executable={python}"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r'script.py:4: note: Revealed type is "(builtins\.)?int"', done.stdout), done.stdout + done.stderr
    assert 'script.py:5: error: "Communicator" has no attribute "no_such_method"' in done.stdout


def _site_python(folder: Path) -> Path:
    """An environment whose only package is the wheel that was unpacked in `folder`."""
    venv.create(folder / "typed", symlinks=True)
    python = folder / "typed" / "bin" / "python"
    site = Path(run(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder))
    shutil.move(folder / "site" / "mpidl", site / "mpidl")
    return python


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
