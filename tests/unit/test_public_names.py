"""The package's public names: each leads to its object, and the lists in mpidl/__init__.py agree."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import mpidl

NAMES = sorted(set(mpidl.__all__) - {"__version__"})


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
