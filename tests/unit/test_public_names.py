"""The package's public names: each leads to its object, and the lists in mpidl/__init__.py agree."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import mpidl

NAMES = sorted(set(mpidl.__all__) - {"__version__"})
RETURNED = {"DevicePacked", "Packed", "Request"}  # no user makes one
CALLED = [name for name in NAMES if name not in RETURNED and not name.endswith("Error")]


def test_all_lists_agree():
    tree = ast.parse(Path(inspect.getfile(mpidl)).read_text())
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("mpidl")]
    assert sorted(name.name for node in typed for name in node.names) == NAMES == sorted(mpidl._HOME)
    assert {n.name: node.module for node in typed for n in node.names} == {
        name: f"mpidl.{home}" for name, home in mpidl._HOME.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there_and_says_what_it_is(name):
    thing = getattr(mpidl, name)
    assert thing.__name__ == name
    assert thing.__doc__
    assert name in dir(mpidl)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Downpuor'"):
        _ = mpidl.Downpuor


def test_the_reference_has_every_name():
    reference = Path(__file__).parents[2] / "docs" / "api.md"
    assert sorted(re.findall(r"^::: mpidl\.(\w+)$", reference.read_text(), re.MULTILINE)) == NAMES


@pytest.mark.parametrize("name", CALLED)
def test_help_has_every_argument_and_points_to_nothing_internal(name):
    """The reader of help(mpidl.Downpour) finds its arguments there, and no base with an internal name."""
    thing = getattr(mpidl, name)
    bases = {base.__name__ for base in inspect.getmro(thing)} if inspect.isclass(thing) else set()
    assert not [base for base in bases - set(NAMES) if f"`{base}`" in thing.__doc__]
    for argument in inspect.signature(thing).parameters:
        assert re.search(rf"^\s+(?:\w+, )*{argument}(?:, \w+)*: ", thing.__doc__, re.MULTILINE), f"{name}: {argument}"
