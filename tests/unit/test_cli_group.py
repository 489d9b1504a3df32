"""`mpidl` and its help: what is listed, what is refused, and what must not be imported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

import mpidl
from mpidl.cli.group import cli


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(arguments), prog_name="mpidl")
    return result.exit_code, result.output


def test_help_lists_the_commands_with_an_example() -> None:
    status, text = invoke("--help")
    assert status == 0
    assert "mpidl run -n 4 -- mpidl train" in text
    for name in ("bench", "doctor", "plot", "run", "train"):
        assert f"\n  {name} " in text


@pytest.mark.parametrize("name", ["bench", "doctor", "plot", "run", "train"])
def test_each_command_has_help_with_an_example(name: str) -> None:
    status, text = invoke(name, "--help")
    assert status == 0
    assert "Example:" in text


def test_the_version_is_the_package_s() -> None:
    assert invoke("--version") == (0, f"mpidl, version {mpidl.__version__}\n")


def test_an_unknown_command_is_a_usage_error() -> None:
    status, text = invoke("trian")
    assert status == 2
    assert "trian" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "job.py", "--algorithm", "adagrad"],
        ["train", "job.py", "--epochs", "0"],
        ["train", "job.py", "--batch-size", "-1"],
        ["train"],
        ["run", "-n", "0", "--", "true"],
        ["run", "-n", "2"],
        ["run", "--", "true"],
        ["doctor", "--time-limit", "0"],
        ["bench", "broadcast"],
        ["bench", "pack", "--rounds", "0"],
        ["bench", "report"],
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: list[str]) -> None:
    assert invoke(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["bench", "pack", "--help"], ["run", "-n", "1", "--", "true"]]
)
def test_neither_torch_nor_mpi_is_imported_for_help_or_run(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from mpidl.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print('LOADED', sorted({'torch', 'mpi4py', 'numpy'} & set(sys.modules)), status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED [] 0"


def test_python_m_mpidl_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mpidl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mpidl, version {mpidl.__version__}\n"
