"""What `import mpidl` adds to the start of Python: interpreters of their own, with it and without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from mpidl.cli.bench import targets
from mpidl.cli.bench.harness import Case, Contender, Field
from mpidl.cli.bench.ranks import Ranks

REFERENCE, RATE = targets.PYTHON, "starts/s"
_PROGRAMS = {targets.PYTHON: "pass", targets.IMPORT: "import mpidl"}
_LOADED = "import sys; print(*sorted({'mpidl', 'mpi4py', 'torch'} & set(sys.modules)))"


def fields(ranks: Ranks, quick: bool) -> Iterator[tuple[Case, AbstractContextManager[Field]]]:
    for case in cases(ranks.size, quick):
        yield case, nullcontext(Field(ranks, [_contender(name, program) for name, program in _PROGRAMS.items()]))


def cases(ranks: int, quick: bool) -> list[Case]:
    return [Case("start of Python", {}, 1.0)]


def _contender(name: str, program: str) -> Contender:
    expected = "mpidl" if name == targets.IMPORT else ""

    def check() -> str:
        loaded = _python(f"{program}; {_LOADED}")
        return "" if loaded == expected else f"loaded are {loaded or 'none'}, not {expected or 'none'}"

    return Contender(name, lambda: _python(program), check)


def _python(program: str) -> str:
    """Returns what a new interpreter prints; not started in a checkout, whose folder mpidl/ would be imported."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=sys.prefix, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
