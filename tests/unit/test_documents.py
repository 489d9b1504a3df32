"""The documents name nothing that is not there: files, links, extras, variables, options, names, defaults, constants.

Each kind of name has one function, which returns what is wrong in a text; each is shown to find a planted wrong name.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import mpidl
from mpidl.cli.group import cli

ROOT = Path(__file__).parents[2]
IN_USE = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "jobs/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
    ROOT / "benchmarks" / "results" / "README.md",
]
DOCUMENTS = [*IN_USE, ROOT / "CHANGELOG.md"]
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)

Check = Callable[[str, Path], list[str]]


def spans(text: str) -> list[str]:
    """The code spans of the prose, without what stands in fences."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]


def commands(text: str) -> Iterator[str]:
    """Spans and lines of shell fences, without comments."""
    yield from spans(text)
    for language, fenced in FENCED.findall(text):
        if language in ("sh", "bash", ""):
            yield from (line.partition("#")[0] for line in fenced.replace("\\\n", " ").splitlines())


# ------------------------------------------------------------------------------------------------------------- files

FOLDERS = ("mpidl", "csrc", "docs", "jobs", "tests", "benchmarks", "packaging", ".github")
A_FILE = re.compile(r"[\w.*/-]+(/|\.(py|c|h|cu|sh|md|sbatch|toml|yml|yaml|txt|cff))")
# What a run writes, what a user has, and files of other projects.
NOT_OURS = re.compile(r"runs|checkpoints|/|.*\bmy_rule\.py$|(train|job|my_job)\.py$")


@functools.cache
def files() -> dict[str, Path]:
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return {path.name: path for path in [*inside, *ROOT.iterdir()]}


def wrong_files(text: str, document: Path) -> list[str]:
    wrong = []
    for span in spans(text):
        for word in re.split(r"[ :,]", span):
            if not A_FILE.fullmatch(word) or NOT_OURS.match(word):
                continue
            places = (ROOT, document.parent, ROOT / "mpidl")
            if not any(list(place.glob(word.rstrip("/"))) for place in places) and word not in files():
                wrong.append(word)
    return wrong


def slugs(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def wrong_links(text: str, document: Path) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in slugs(file.read_text() if name else text)):
            wrong.append(target)
    return wrong


# ------------------------------------------------------------------------------------------------ extras and variables


@functools.cache
def extras() -> set[str]:
    (table,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    return set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def wrong_extras(text: str, document: Path) -> list[str]:
    named = [name for group in re.findall(r"(?:\.|mpidl|\.whl)\[([\w,]+)\]", text) for name in group.split(",")]
    named += re.findall(r"\bextras? `(\w+)`", text)
    return [name for name in named if name not in extras()]


@functools.cache
def sources() -> str:
    """All that is ours and no document."""
    kinds = (".py", ".c", ".h", ".cu", ".sh", ".sbatch")
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path != Path(__file__))
    ours = [path for path in [*inside, ROOT / "setup.py", ROOT / "pyproject.toml"] if path.suffix in (*kinds, ".toml")]
    return "\n".join(path.read_text() for path in ours)


def wrong_variables(text: str, document: Path) -> list[str]:
    """Variables that nothing reads: a program reads one by its quoted name, a script by `$`."""
    named = sorted(set(re.findall(r"\b(?:MPIDL|SLURM|OMPI|PRTE|MPIR|CUDA)_[A-Z_]+[A-Z]\b", text)))
    of_others = ("OMPI_", "PRTE_", "MPIR_")
    return [
        name
        for name in named
        if not name.startswith(of_others) and not re.search(rf"""["']{name}["']|\${{?{name}\b""", sources())
    ]


# ----------------------------------------------------------------------------------------------------------- options


def options_of(command: click.Command) -> set[str]:
    own = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    below = (options_of(one) for one in command.commands.values()) if isinstance(command, click.Group) else ()
    return own.union({"--help", "-h"}, *below)


@functools.cache
def options() -> dict[str, set[str]]:
    context = click.Context(cli)
    names = cli.list_commands(context)
    found = {name: cli.get_command(context, name) for name in names}
    return {"": {"--version"}, **{name: options_of(command) for name, command in found.items() if command}}


def wrong_options(text: str, document: Path) -> list[str]:
    """Options after `mpidl COMMAND` that the command lacks, commands that mpidl lacks, and options of nothing."""
    wrong = []
    every = set().union(*options().values())
    for command in commands(text):
        if command.startswith("--") and len(command.split()[0]) > 2:
            option = command.split()[0].partition("=")[0]
            if option not in every and option not in sources():
                wrong.append(option)
        for part in re.split(r"\s--\s", command):
            called = re.search(r"(?:^|\s)mpidl ([a-z][\w|-]*)(.*)", part)
            if not called:
                continue
            names = [called[1]] if called[1] in options() else called[1].split("|")
            wrong += [name for name in names if name not in options()]
            for option in re.findall(r"(?:^|\s)(--[\w-]+)", called[2]):
                wrong += [option for name in names if option not in options().get(name, every)]
    return wrong


# ------------------------------------------------------------------------------------------------- names in the code

# Programs, words of other libraries and letters of formulas, which nothing of ours defines.
OF_OTHERS = {
    *(
        "python3",
        "gcc",
        "mpirun",
        "srun",
        "sbatch",
        "dist",
        "state",
        "step",
        "auto",
        "cuda",
        "Isend",
        "Irecv",
        "zero_grad",
        "scancel",
        "scontrol",
        "site",
        "pytest",
        "git",
    ),
    *(
        "MPI_Accumulate",
        "MPI_Get_accumulate",
        "MPI_Put",
        "PYTHONPATH",
        "mpi4py",
        "DistributedDataParallel",
        "DistributedOptimizer",
        "push_pull",
    ),
    *(
        "process_group",
        "allreduce_hook",
        "MPI_COMM_TYPE_SHARED",
        "MPI_Win",
        "LOCAL_WORLD_SIZE",
        "ZeroRedundancyOptimizer",
    ),
}
A_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(.*\))?")


@functools.cache
def words() -> set[str]:
    return set(re.findall(r"\w+", sources()))


def wrong_names(text: str, document: Path) -> list[str]:
    """Names in code spans, and constants, which no source has; of `mpidl.x` in snippets, those that are not public."""
    wrong = []
    for span in spans(text):
        if A_NAME.fullmatch(span):
            parts = span.partition("(")[0].split(".")
            if parts[0] == "mpidl" and len(parts) > 1:
                home = ROOT.joinpath(*parts)
                if not hasattr(mpidl, parts[1]) and not home.exists() and not home.with_suffix(".py").exists():
                    wrong.append(span)
            elif A_FILE.fullmatch(span) is None:
                wrong += [part for part in parts[-2:] if part not in words() and part not in OF_OTHERS]
    for language, fenced in FENCED.findall(text):
        if language == "python":
            named = re.findall(r"\bmpidl\.(?!\w+\.\w+ import)(\w+)", fenced)
            wrong += [name for name in named if not hasattr(mpidl, name) and not (ROOT / "mpidl" / name).exists()]
    return wrong


def wrong_defaults(text: str, document: Path) -> list[str]:
    """Defaults in a table of classes that are not those of the signature: `name` (default)."""
    wrong = []
    for row in text.splitlines():
        cells = row.split(" | ")
        classes = [name for name in re.findall(r"`(\w+)`", cells[0]) if inspect.isclass(getattr(mpidl, name, None))]
        if not row.startswith("| `") or not classes:
            continue
        for name, default in re.findall(r"`(\w+)` \(([^)]+)\)", row):
            parameter = inspect.signature(getattr(mpidl, classes[0])).parameters.get(name)
            if parameter is None:
                wrong.append(f"{classes[0]}({name})")
            elif parameter.default != ast.literal_eval(default.replace('"', "'")):
                wrong.append(f"{classes[0]}({name}={default})")
    return wrong


# Figures of `docs/allreduce_tour.md` and where the code has them.
FIGURES = [
    (r"segments of (\d+) KiB for each lane", "mpidl/collectives/lanes/pipeline.py", r"^SLICE = 1 << (\d+)"),
    (r"up to (six) segments at a time", "mpidl/collectives/lanes/pipeline.py", r"^AHEAD = (\d+)"),
    (r"Pieces have at most (\d+) KiB", "mpidl/mpi/shared_memory.py", r"^_PIECE = \(1 << \d+, 1 << (\d+)\)"),
]


@pytest.mark.parametrize(("sentence", "file", "constant"), FIGURES)
def test_the_tour_s_figures_are_the_code_s(sentence: str, file: str, constant: str) -> None:
    tour = (ROOT / "docs" / "allreduce_tour.md").read_text()
    (said,), (number,) = re.findall(sentence, tour), re.findall(constant, (ROOT / file).read_text(), re.MULTILINE)
    assert int(number) == (6 if said == "six" else (int(said) * 1024).bit_length() - 1)


CHECKS: dict[str, Check] = {
    "files": wrong_files,
    "links": wrong_links,
    "extras": wrong_extras,
    "variables": wrong_variables,
    "options": wrong_options,
    "names": wrong_names,
    "defaults": wrong_defaults,
}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("document", IN_USE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(kind: str, document: Path) -> None:
    assert CHECKS[kind](document.read_text(), document) == []


# The changelog tells of what was; its links must still lead somewhere.
def test_the_changelog_links_to_what_is_there() -> None:
    document = ROOT / "CHANGELOG.md"
    assert wrong_links(document.read_text(), document) == []


PLANTED = [
    ("files", "See `mpidl/mpi/waitin.py`.", ["mpidl/mpi/waitin.py"]),
    ("files", "See `waitin.py` and `jobs/*.batch.sh`.", ["waitin.py", "jobs/*.batch.sh"]),
    ("links", "[a](docs/nothing.md)", ["docs/nothing.md"]),
    ("links", "[a](docs/optimizers.md#nothing)", ["docs/optimizers.md#nothing"]),
    ("extras", "`pip install '.[cudda]'`", ["cudda"]),
    ("extras", "the extra `tensorboad`", ["tensorboad"]),
    ("variables", "`MPIDL_TIMEOUTS=3`", ["MPIDL_TIMEOUTS"]),
    ("options", "`mpidl train --epoch 3`", ["--epoch"]),
    ("options", "```sh\nmpidl run -n 4 -- mpidl train a.py --shards  # --ok\n```", ["--shards"]),
    ("options", "`mpidl tran`", ["tran"]),
    ("options", "`--no-such-option`", ["--no-such-option"]),
    ("names", "`mpidl.Downpuor`", ["mpidl.Downpuor"]),
    ("names", "```python\nmpidl.Downpuor()\n```", ["Downpuor"]),
    ("names", "`THREAD_MULTIPEL` and `optimizer.statistcs`", ["THREAD_MULTIPEL", "statistcs"]),
    ("defaults", "| `AGN` | what | `communication_window` (7) |", ["AGN(communication_window=7)"]),
    ("defaults", "| `AGN` | what | `window` (5) |", ["AGN(window)"]),
]


@pytest.mark.parametrize(("kind", "text", "wrong"), PLANTED)
def test_a_planted_wrong_name_is_found(kind: str, text: str, wrong: list[str]) -> None:
    assert CHECKS[kind](text, ROOT / "README.md") == wrong


def test_every_check_has_planted_names() -> None:
    assert {kind for kind, _, _ in PLANTED} == set(CHECKS)
