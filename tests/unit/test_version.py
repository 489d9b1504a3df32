"""One number and one list of dependencies: package, metadata, command, changelog, citation and recipes agree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import mpidl

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
SPACK = ROOT / "packaging" / "spack" / "package.py"
CONDA = (ROOT / "packaging" / "conda" / "recipe.yaml").read_text()


def test_the_metadata_and_the_command_have_the_package_s_number() -> None:
    assert importlib.metadata.version("mpidl") == mpidl.__version__
    command = [sys.executable, "-m", "mpidl", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(mpidl.__file__).parents[1])
    assert done.stdout == f"mpidl, version {mpidl.__version__}\n"


def number_of_source() -> str:
    (number,) = re.findall(r'^__version__ = "(.*)"$', (ROOT / "mpidl" / "__init__.py").read_text(), re.MULTILINE)
    return str(number)


def test_it_stands_in_one_place_of_the_package() -> None:
    assert number_of_source() == mpidl.__version__
    (project,) = re.findall(r"^\[project\]\n(.*?)^\[", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert re.search(r"^version\s*=", project, re.MULTILINE) is None
    assert 'dynamic = ["version"]' in PYPROJECT
    others = [path for path in (ROOT / "mpidl").rglob("*.py") if re.search(r"^__version__\s*=", path.read_text(), re.M)]
    assert others == [ROOT / "mpidl" / "__init__.py"]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CHANGELOG.md", r"\A# Changelog\n(?:\n## Unreleased\n(?:(?!## ).*\n)*)?\n## (\S+)"),
        ("CITATION.cff", r"(?m)^version: (\S+)$"),
        ("packaging/conda/recipe.yaml", r'(?m)^  version: "(\S+)"$'),
        ("packaging/spack/package.py", r'\bversion\("([^"]+)"'),
        ("packaging/spack/package.py", r'pypi = "mpidl/mpidl-(.*)\.tar\.gz"'),
    ],
)
def test_the_newest_version_is_named_by(file: str, pattern: str) -> None:
    found = re.search(pattern, (ROOT / file).read_text())
    assert found
    assert found[1].rstrip(",") == number_of_source()


# -------------------------------------------------------------------------------------------------------- the recipes

NAMES = {"pytorch": "torch"}  # conda's


def pairs(text: str) -> dict[str, str]:
    return dict(re.findall(r'^    "([a-z0-9-]+)>=([0-9.]+)"', text, re.MULTILINE))


def dependencies() -> dict[str, str]:
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    return {**pairs(listed), "python": re.findall(r'requires-python = ">=(.*)"', PYPROJECT)[0]}


def test_conda_s_recipe_wants_what_the_package_wants() -> None:
    (run,) = re.findall(r"^  run:\n(.*?)^\S", CONDA + "\nend", re.MULTILINE | re.DOTALL)
    found = re.findall(r"- ([a-z0-9-]+) >=([0-9.]+)$", run, re.MULTILINE)
    assert {NAMES.get(name, name): least for name, least in found} == dependencies()
    assert run.count("- ") == len(dependencies())
    assert re.search(r"- setuptools >=(\S+)", CONDA)[1] == re.search(r"setuptools>=([\d.]+)\"", PYPROJECT)[1]  # type: ignore[index]


class Recorded:
    """Stands for Spack: takes the directives of a recipe down."""

    def __init__(self) -> None:
        self.directives: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def modules(self) -> dict[str, types.ModuleType]:
        names = ("version", "variant", "depends_on", "license")
        package = types.ModuleType("spack.package")
        for name in names:
            setattr(package, name, self._directive(name))
        package.EnvironmentModifications = dict  # type: ignore[attr-defined]
        base = types.ModuleType("spack_repo.builtin.build_systems.python")
        base.PythonPackage = type("PythonPackage", (), {})  # type: ignore[attr-defined]
        parents = ("spack", "spack_repo", "spack_repo.builtin", "spack_repo.builtin.build_systems")
        return {**{name: types.ModuleType(name) for name in parents}, package.__name__: package, base.__name__: base}

    def _directive(self, name: str) -> Any:
        return lambda *args, **keywords: self.directives.append((name, args, keywords))


@pytest.fixture
def spack(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    for name, module in recorded.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("package_of_spack", SPACK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PyMpidl.__doc__
    return recorded


def test_spack_s_recipe_wants_what_the_package_wants(spack: Recorded) -> None:
    found = {}
    for name, args, keywords in spack.directives:
        if name == "depends_on" and "when" not in keywords and "run" in keywords["type"] and args[0] != "mpi":
            package, least = args[0].split("@")
            found[package.removeprefix("py-")] = least.rstrip(":")
    assert found == dependencies()


def test_spack_s_variants_are_extras(spack: Recorded) -> None:
    (extras,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", PYPROJECT, re.MULTILINE | re.DOTALL)
    named = re.findall(r'^(\w+) = \["([a-z0-9-]+)>=([\d.]+)"', extras, re.MULTILINE)
    listed = {name: (package.replace("cupy-cuda12x", "cupy"), least) for name, package, least in named}
    variants = {args[0] for name, args, _ in spack.directives if name == "variant"}
    assert variants == {"jobs", "plot", "cuda"}
    for variant in variants:
        package, least = listed[variant]
        wanted = [args[0] for _, args, keywords in spack.directives if keywords.get("when") == f"+{variant}"]
        assert f"py-{package}@{least}:" in wanted
