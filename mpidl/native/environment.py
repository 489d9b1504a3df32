"""The environment variables that mpidl reads, in one table with one parser.

The table stands on the lowest floor that reads a variable (MPIDL_INSTRUCTIONS, in `library`), since imports point down
only. A variable that is unset or empty has its default. Variables of the build (MPIDL_CUDA, MPIDL_WERROR), of
`jobs/quickstart.sh` (MPIDL_TORCH_INDEX) and of the tests (MPIDL_TESTS_...) are read elsewhere and are not listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mpidl.errors import ArgumentError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Variable(Generic[Value]):
    """One environment variable.

    Attributes:
        name: what the user sets.
        parse: turns the text into a value; raises ValueError for a text that makes no sense.
        default: the value where the variable is unset or empty.
        expected: which texts make sense, for the message of an error.
        meaning: one line for documents.
    """

    name: str
    parse: Callable[[str], Value]
    default: Value
    expected: str
    meaning: str

    def text(self, environ: Mapping[str, str] | None = None) -> str:
        """Returns the text that the variable is set to, unchecked; "" where the variable is unset."""
        return (os.environ if environ is None else environ).get(self.name, "")

    def read(self, environ: Mapping[str, str] | None = None) -> Value:
        """Returns the value that the variable is set to, or the default.

        Args:
            environ: where the variable stands; None for the environment of this process.

        Raises:
            ArgumentError: the text makes no sense.
        """
        text = self.text(environ)
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise ArgumentError(f"{self.name}={text!r}: expected {self.expected}") from None


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def _one_of(*names: str, **aliases: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        name = aliases.get(text, text)
        if name not in names:
            raise ValueError
        return name

    return parse


_SECONDS = "a positive number of seconds"

TIMEOUT: Variable[float] = Variable(
    "MPIDL_TIMEOUT",
    _seconds,
    1800.0,
    _SECONDS,
    "seconds after which a rank that waits for others gives up, with `StalledError`",
)
STALL_REPORT: Variable[float] = Variable(
    "MPIDL_STALL_REPORT",
    _seconds,
    60.0,
    _SECONDS,
    "seconds after which a rank that waits for others names the ranks that are missing",
)
SHARED_MEMORY: Variable[bool] = Variable(
    "MPIDL_SHARED_MEMORY",
    _switch,
    True,
    "0 (ranks of a node exchange all data by MPI) or 1",
    "0: the ranks of a node exchange all data by MPI",
)
NODE_SIZE: Variable[int | None] = Variable(
    "MPIDL_NODE_SIZE",
    _count,
    None,
    "a positive number of ranks per node",
    "the number of ranks that each node is taken to have, to try out several nodes on one machine",
)
DETERMINISTIC: Variable[bool] = Variable(
    "MPIDL_DETERMINISTIC",
    _switch,
    False,
    "0 (the algorithm depends on the measured link) or 1 (on sizes alone)",
    "1: algorithms between nodes are chosen by sizes alone, not by what is measured of the link",
)
REPLAY: Variable[str] = Variable(
    "MPIDL_REPLAY",
    str,
    "",
    "the name of a file",
    "a file with the order of asynchronous exchanges: the run follows the file, or writes the file if there is none",
)
CENTER: Variable[str] = Variable(
    "MPIDL_CENTER",
    _one_of("active_message", "rma", mail="active_message"),
    "",
    "active_message or rma, or nothing",
    "how workers reach a center on other nodes: `active_message` or `rma`; alike on all ranks",
)
HELPER: Variable[bool | None] = Variable(
    "MPIDL_HELPER",
    _switch,
    None,
    "0 (no progress thread) or 1",
    "1: a progress thread moves gradients on during backward; 0: no thread does",
)
INSTRUCTIONS: Variable[str] = Variable(
    "MPIDL_INSTRUCTIONS",
    str,  # what is possible depends on the processor: `library` checks it
    "",
    "an instruction set",
    "the instruction set of the kernels: `avx512`, `avx2` or `portable`",
)
CUDA_AWARE: Variable[str] = Variable(
    "MPIDL_CUDA_AWARE",
    _one_of("0", "1", "auto"),
    "0",
    "0 (never), auto (if a child process shows it) or 1 (trust)",
    "whether `Communicator` hands arrays on a device to MPI itself: `0`, `auto` or `1`",
)
TERMINAL: Variable[int | None] = Variable(
    "MPIDL_TERMINAL",
    _count,
    None,
    "a positive number of columns",
    "the width of the terminal in columns; `mpidl run` sets the variable for its ranks",
)

#: The whole table.
VARIABLES: tuple[Variable[Any], ...] = (
    *(TIMEOUT, STALL_REPORT, SHARED_MEMORY, NODE_SIZE, DETERMINISTIC, REPLAY),
    *(CENTER, HELPER, INSTRUCTIONS, CUDA_AWARE, TERMINAL),
)
