"""What a signal to `mpidl run` does to a job of plain processes; to ranks: programs/test_run.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import alive

from mpidl.cli.launch.supervisor import descendants

SUPERVISE = (
    "import os, sys; from mpidl.cli.launch.supervisor import supervise; sys.exit(supervise(sys.argv[1:], os.environ))"
)

# A job that writes what it got; it survives SIGUSR1 and, if told so, SIGTERM.
JOB = """
import os, signal, subprocess, sys, time
log, survive = sys.argv[1], sys.argv[2:]
def note(text):
    with open(log, "a") as stream:
        stream.write(text + "\\n")
signal.signal(signal.SIGUSR1, lambda *_: note("asked"))
if "SIGTERM" in survive:
    signal.signal(signal.SIGTERM, lambda *_: note("ended"))
if "child" in survive:
    child = subprocess.Popen([sys.executable, "-c", "import signal, time\\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nprint('deaf', flush=True)\\ntime.sleep(60)"],
        stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    note(f"child {child.pid}")
note(f"group {os.getpgid(0)}")
note("ready")
until = time.time() + 60
while time.time() < until:
    time.sleep(0.02)
    if "stops" in survive and "asked" in open(log).read():
        sys.exit(75)
"""


class Supervised:
    """`supervise` in a process of its own, over JOB."""

    def __init__(self, folder: Path, *survive: str) -> None:
        self.log = folder / "log"
        self.log.touch()
        command = [sys.executable, "-c", SUPERVISE, sys.executable, "-c", JOB, str(self.log), *survive]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.until("ready")

    def until(self, text: str) -> str:
        limit = time.monotonic() + 30
        while text not in self.log.read_text():
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.02)
        return self.log.read_text()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        return self.process.wait(timeout=30)


@pytest.mark.parametrize(("program", "status"), [("true", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_status_is_the_job_s(program: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", SUPERVISE, "sh", "-c", program], check=False)
    assert done.returncode == status


def test_the_job_has_a_process_group_of_its_own(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    group = int(supervised.until("group").partition("group ")[2].split()[0])
    assert group != os.getpgid(supervised.process.pid)
    supervised.send(signal.SIGTERM)
    supervised.status()


def test_the_first_interrupt_asks_and_the_job_s_status_comes_back(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "stops")
    supervised.send(signal.SIGINT)
    assert supervised.status() == 75
    assert supervised.log.read_text().count("asked") == 1


def test_the_second_interrupt_ends_the_job(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    supervised.send(signal.SIGINT)
    supervised.until("asked")
    supervised.send(signal.SIGINT)
    assert supervised.status() == 128 + signal.SIGTERM


def test_sigterm_ends_the_job_at_once(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    supervised.send(signal.SIGTERM)
    assert supervised.status() == 128 + signal.SIGTERM
    assert "asked" not in supervised.log.read_text()


def test_what_ignores_sigterm_is_killed_with_all_that_stems_from_it(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "SIGTERM", "child")
    child = int(supervised.log.read_text().partition("child ")[2].split()[0])
    assert child in descendants(supervised.process.pid)
    began = time.monotonic()
    supervised.send(signal.SIGTERM)
    assert supervised.status() == 128 + signal.SIGKILL
    assert time.monotonic() - began < 10
    assert "ended" in supervised.log.read_text()
    assert not alive(child)
