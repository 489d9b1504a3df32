"""Whether MPI may work on the memory of devices itself: only where a child process has shown that it can.

An MPI that cannot, or that claims to and cannot (mpi4py#115), ends a process that tries it; so a child tries, alone
(`cuda_probe`), and dies in its stead. MPIDL_CUDA_AWARE says whether: 0, the default: never; auto: if the child of every
rank has shown it; 1: without a child. The decision is one for all ranks of a communicator, made in the first call that
is given an array on a device; otherwise such arrays go through pinned host memory.

One process alone can show that MPI knows a device's memory, moves it and reduces it, not what happens between two
devices or nodes: that is why auto is not the default.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.mpi import exit_protocol
from mpidl.mpi.agreement import disagreement
from mpidl.mpi.topology import Topology
from mpidl.native import environment

VARIABLE = environment.CUDA_AWARE.name
_TIME_LIMIT = 15.0  # seconds that a child may take; the doctor gives a whole check 20

# What launchers leave in the environment of a rank; a child that sees it would take itself for that rank. What users
# set for Open MPI itself (OMPI_MCA_..., OMPI_ALLOW_RUN_AS_ROOT) decides whether it is CUDA-aware, and stays.
_OF_LAUNCHERS = re.compile(
    r"(PMI|PRTE_|HYDI_|HYDRA_|MPI_LOCAL|MPIRUN_|MV2_COMM_|I_MPI_PMI|SLURM|FLUX_|PALS_|ALPS_|OMPI_(?!MCA_|ALLOW_))"
)

# A rank's answer is its child's exit status, negative for a signal, or one of these. Two of all answers are a yes.
_SHOWN, _TRUSTED = 0, 1001
_LATE, _NOT_STARTED, _OFF, _ON_HOST = 1002, 1003, 1004, 1005
_REASONS = {
    _SHOWN: "shown by a child process",
    _TRUSTED: f"{VARIABLE}=1",
    _LATE: f"the child process that tried it did not end within {_TIME_LIMIT:g} s",
    _NOT_STARTED: "the child process that was to try it could not be started",
    _OFF: f"{VARIABLE}=0",
    _ON_HOST: "the array of the first such call was in host memory",
}


@dataclass(frozen=True)
class Decision:
    """What all ranks of a communicator have decided, and each rank's reason."""

    direct: bool
    reasons: str


class _Child:
    """The child that tries; `Test` is named as MPI's, so that code that polls a request can poll this."""

    def __init__(self, device: str) -> None:
        self.answer: int | None = None
        self._until = time.monotonic() + _TIME_LIMIT
        try:
            self._process = subprocess.Popen(
                _command(device),
                cwd=Path(__file__).parents[2],  # -m looks there first, and finds this very mpidl
                env=without_launcher(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            self.answer = _NOT_STARTED

    def Test(self) -> bool:  # noqa: N802
        """Returns whether the child has answered; ends it when its time is over."""
        if self.answer is None:
            self.answer = self._process.poll()
            if self.answer is None and time.monotonic() > self._until:
                self.answer = _LATE
                self._end()
        return self.answer is not None

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer: it is not waited for
            self._process.wait(1)


_children: dict[str, _Child] = {}  # one for each device, whatever the communicator
_decisions: weakref.WeakKeyDictionary[Topology, Decision] = weakref.WeakKeyDictionary()
_said: set[str] = set()


def wished() -> bool:
    """Whether this rank's user set anything but 0; a text without sense is refused with the first array on a device."""
    return environment.CUDA_AWARE.text() not in ("", "0")


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns a rank's environment without what its launcher put there: a process in it starts MPI alone."""
    return {name: value for name, value in environ.items() if not _OF_LAUNCHERS.match(name)}


def undecided(topology: Topology, device: str) -> bool:
    """Returns whether this rank, given an array on `device`, needs a decision that has not been made."""
    return device != "cpu" and topology not in _decisions and environment.CUDA_AWARE.read() != "0"


def direct(topology: Topology, device: str) -> bool:
    """Returns whether MPI works on arrays of this device itself."""
    return device != "cpu" and topology in _decisions and _decisions[topology].direct


def decide(topology: Topology, device: str) -> Generator[Any, None, Decision]:
    """Makes the decision; a collective, and a task: each request that it yields must complete before it goes on.

    Args:
        topology: whose ranks decide.
        device: where this rank's array lies.
    """
    setting = environment.CUDA_AWARE.read() if device != "cpu" else "0"
    answer: int | None = _ON_HOST if device == "cpu" else _TRUSTED if setting == "1" else _OFF
    if setting == "auto":
        if device not in _children:
            _children[device] = _Child(device)
        yield _children[device]
        answer = _children[device].answer
    mine, everyone = np.array([answer], np.int64), np.empty(topology.size, np.int64)
    yield topology.start_words_gather(mine, everyone)
    reasons = disagreement(_reason(one) for one in everyone.tolist())
    decision = Decision(all(one in (_SHOWN, _TRUSTED) for one in everyone), reasons)
    _decisions[topology] = decision
    if not decision.direct and topology.rank == 0 and decision.reasons not in _said:
        _said.add(decision.reasons)
        exit_protocol.say(f"arrays on a device go to MPI through pinned host memory ({decision.reasons})")
    return decision


def decide_now(topology: Topology, device: str) -> Decision:
    """Makes the decision and returns it; a polled collective."""
    sequence = topology.begin()
    for request in decide(topology, device):
        topology.wait(request, "deciding whether MPI works on the memory of devices", sequence)
    return _decisions[topology]


def _command(device: str) -> list[str]:
    return [sys.executable, "-m", "mpidl.mpi.cuda_probe", device, str(int(_TIME_LIMIT))]


def _reason(answer: int) -> str:
    if answer in _REASONS:
        return _REASONS[answer]
    how = f"was ended by signal {-answer}" if answer < 0 else f"ended with status {answer}"
    return f"the child process that tried it {how}"
