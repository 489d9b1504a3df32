"""Every snippet of docs/ is run, one page a launch, with 2 ranks; CI builds the pages themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launching import run_ranks

pytestmark = pytest.mark.any_mpi

DOCS = Path(__file__).parents[2] / "docs"
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = [page for page in sorted(DOCS.glob("*.md")) if SNIPPET.search(page.read_text())]


def test_there_are_snippets():
    assert {page.name for page in PAGES} == {"collectives.md", "correctness.md", "optimizers.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(tmp_path, page):
    program = tmp_path / "snippets.py"
    pieces = [
        f"exec(compile({text!r}, 'snippet {i}', 'exec'), {{}})"
        for i, text in enumerate(SNIPPET.findall(page.read_text()))
    ]
    program.write_text("\n".join([*pieces, "print('all ran')"]))
    result = run_ranks(2, [sys.executable, str(program)], timeout=60)
    assert result.returncode == 0, result.output
    assert result.stdout.count("all ran") == 2
