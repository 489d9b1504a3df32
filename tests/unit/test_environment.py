"""The table of environment variables: what each text means, and that the documents and the code name no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from mpidl.errors import ArgumentError
from mpidl.native import environment
from mpidl.native.environment import VARIABLES, Variable

ROOT = Path(__file__).parents[2]
JOBS = sorted(file for file in (ROOT / "jobs").iterdir() if file.is_file())
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *JOBS]
# Read by setup.py, by jobs/quickstart.sh and by the tests: the table leaves them out.
OF_OTHERS = re.compile(r"MPIDL_(CUDA|WERROR|TORCH_INDEX|API|HEADERS|TESTS_\w+)")  # of the build, of C, of the tests
NAMES = [variable.name for variable in VARIABLES]


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (environment.TIMEOUT, "2.5", 2.5),
        (environment.STALL_REPORT, "1e3", 1000.0),
        (environment.SHARED_MEMORY, "0", False),
        (environment.NODE_SIZE, "3", 3),
        (environment.DETERMINISTIC, "1", True),
        (environment.REPLAY, "order.json", "order.json"),
        (environment.CENTER, "rma", "rma"),
        (environment.CENTER, "active_message", "active_message"),
        (environment.CENTER, "mail", "active_message"),
        (environment.HELPER, "0", False),
        (environment.INSTRUCTIONS, "avx2", "avx2"),
        (environment.CUDA_AWARE, "auto", "auto"),
        (environment.TERMINAL, "132", 132),
    ],
)
def test_a_text_becomes_a_value(
    variable: Variable[Any], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    found = variable.read()
    assert found == value
    assert type(found) is type(value)
    assert variable.text() == text
    assert variable.read({variable.name: text}) == value


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda one: one.name)
def test_unset_and_empty_mean_the_default(variable: Variable[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable.name, raising=False)
    assert variable.read() == variable.default
    monkeypatch.setenv(variable.name, "")
    assert variable.read() == variable.default


@pytest.mark.parametrize(
    ("variable", "texts"),
    [
        (environment.TIMEOUT, ["0", "-1", "soon", "nan"]),
        (environment.STALL_REPORT, ["0", "never"]),
        (environment.SHARED_MEMORY, ["yes", "2", " 1"]),
        (environment.NODE_SIZE, ["0", "-2", "two", "1.5"]),
        (environment.DETERMINISTIC, ["true"]),
        (environment.CENTER, ["post", "RMA"]),
        (environment.HELPER, ["no"]),
        (environment.CUDA_AWARE, ["yes"]),
        (environment.TERMINAL, ["0", "wide"]),
    ],
)
def test_an_error_has_the_name_the_text_and_what_was_expected(variable: Variable[Any], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(ArgumentError) as raised:
            variable.read({variable.name: text})
        assert str(raised.value) == f"{variable.name}={text!r}: expected {variable.expected}"


def test_names_differ() -> None:
    assert len(set(NAMES)) == len(NAMES) == 11


def test_the_table_of_the_documents_is_this_one() -> None:
    rows = re.findall(r"^\| `(MPIDL_\w+)` \|(.*?)\| (.*) \|$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert [(name, meaning) for name, _, meaning in rows] == [(one.name, one.meaning) for one in VARIABLES]
    for (_, default, _), variable in zip(rows, VARIABLES, strict=True):
        if variable.default not in (None, ""):
            assert default.strip() == f"{float(variable.default):g}"


def test_documents_name_no_other_variables() -> None:
    assert not OF_OTHERS.fullmatch("MPIDL_TIMEOUT")
    named = {found for file in DOCUMENTS for found in re.findall(r"MPIDL_[A-Z][A-Z_]*[A-Z]", file.read_text())}
    assert {"MPIDL_TIMEOUT", "MPIDL_CUDA"} <= named
    assert not [name for name in named if name not in NAMES and not OF_OTHERS.fullmatch(name)]


def test_the_code_names_variables_in_the_table_only() -> None:
    """A variable that is read past the table has its name as a whole string somewhere."""
    elsewhere = []
    for file in sorted((ROOT / "mpidl").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
                elsewhere.append(file.name)
    assert elsewhere == ["environment.py"] * len(NAMES)
    unknown = {
        found for file in (ROOT / "mpidl").rglob("*.py") for found in re.findall(r"MPIDL_[A-Z_]+", file.read_text())
    }
    assert {name for name in unknown if name not in NAMES and not OF_OTHERS.fullmatch(name)} == {"MPIDL_TESTS_"}
