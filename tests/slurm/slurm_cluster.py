"""A SLURM cluster for the tests: started by cluster.sh for as long as the tests hold it, and asked from outside.

Jobs are submitted from a folder of their own, in which `jobs` is the checkout's: their outputs land there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launching import environment_for_tests

from mpidl.cli.launch.supervisor import descendants

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
INSIDE = "MPIDL_TESTS_CLUSTER"  # set by cluster.sh for its command: the number of nodes
TIME_LIMIT = 1800.0  # seconds that a job may take: to end a hang, not to judge speed
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    job: int
    state: str  # SLURM's word, such as COMPLETED
    status: int  # exit status of its script
    restarts: int
    output: str  # what it printed, over all restarts


def missing() -> str:
    """What this machine lacks for a cluster; empty: nothing."""
    return subprocess.run([SCRIPT, "--missing"], capture_output=True, text=True, check=False).stdout.strip()


class Cluster:
    """A running cluster: the one that this process is in, or one of its own until `close`."""

    def __init__(self) -> None:
        # Not in /tmp, which every node has for itself.
        (ROOT / "runs").mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-tests-", dir=ROOT / "runs"))
        (self.folder / "jobs").symlink_to(ROOT / "jobs")
        self._holder: subprocess.Popen[str] | None = None
        self._enter: list[str] = []
        self._environment = {
            **environment_for_tests(),
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{sys.prefix}/bin:{os.environ.get('PATH', os.defpath)}",
            # MPICH by libfabric: what its UCX announces is longer than pmi2 reads, now and then (jobs/README.md).
            "MPIR_CVAR_CH4_NETMOD": "ofi",
            "FI_PROVIDER": "tcp",  # not through the kernel that the nodes share
            "OMPI_MCA_osc": "^ucx",  # whose complaint about itself is harmless
        }
        if INSIDE not in os.environ:
            self._start()

    def _start(self) -> None:
        """Starts the cluster; it lives as long as its command, which lives until its standard input is closed."""
        command = [SCRIPT, "--", "sh", "-c", "echo up; exec cat"]
        self._holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment, cwd=ROOT
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            raise RuntimeError(f"the cluster did not come up; {SCRIPT.name} printed why")
        self._enter = [
            "nsenter",
            "--all",
            "--target",
            str(self._first_process()),
            "env",
            "SLURM_CONF=/etc/slurm/slurm.conf",
        ]

    def _first_process(self) -> int:
        """The process of cluster.sh that is number 1 in the namespace of the head."""
        assert self._holder is not None
        for pid in descendants(self._holder.pid):
            numbers = re.search(r"^NSpid:\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            if numbers is not None and numbers[1].split()[1:] == ["1"]:
                return pid
        raise RuntimeError("the cluster's first process was not found")

    def close(self) -> None:
        """Takes the cluster down and removes the jobs' folder."""
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            self._holder.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = TIME_LIMIT
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head, in the jobs' folder."""
        there = [*self._enter, "env", f"--chdir={self.folder}", *command]
        environment = {**self._environment, **(env or {})}
        return subprocess.run(
            there,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None) -> int:
        """Calls sbatch; returns the job's number."""
        done = self.run(["sbatch", "--parsable", *arguments], env=env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        done = self.run(["scontrol", "--oneliner", "show", "job", str(job)])
        assert done.returncode == 0, done.stderr
        return dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)

    def until(self, there: Callable[[], object], job: int, what: str, timeout: float = TIME_LIMIT) -> None:
        """Waits for something that a job does; that it does not come is a failure that shows the job's output."""
        limit = time.monotonic() + timeout
        while not there():
            if time.monotonic() > limit:
                told = self.show(job)
                self.run(["scancel", str(job)])
                raise AssertionError(
                    f"{timeout:.0f} s without {what}; {told['JobName']} is {told['JobState']} and printed:\n"
                    f"{self.output(told)}"
                )
            time.sleep(0.3)

    def wait(self, job: int) -> Ended:
        """Waits for the job's end."""
        self.until(lambda: self.show(job)["JobState"] in _ENDED, job, "its end")
        told = self.show(job)
        status = int(told["ExitCode"].partition(":")[0])
        return Ended(job, told["JobState"], status, int(told["Restarts"]), self.output(told))

    @staticmethod
    def output(told: Mapping[str, str]) -> str:
        """What a job has printed so far."""
        try:
            return Path(told["StdOut"]).read_text(errors="replace")
        except FileNotFoundError:
            return ""
