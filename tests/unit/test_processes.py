"""Whether a process is alive, and what is taken for it when that cannot be found out."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys

import pytest

from mpidl.mpi.processes import Process, start_time

pytestmark = pytest.mark.any_mpi


def test_the_living_the_dead_and_a_pid_that_was_given_again():
    mine = start_time(os.getpid())
    assert Process(os.getpid(), mine, visible=True).alive()
    assert not Process(os.getpid(), mine - 1, visible=True).alive()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process(child.pid, start_time(child.pid), visible=True)
        assert process.alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.alive()  # a zombie
    assert not process.alive()
    assert Process(process.pid, process.start, visible=False).alive()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_who_cannot_be_looked_up_is_not_taken_for_dead(monkeypatch, number):
    def refuses(*_, **__):
        raise OSError(number, os.strerror(number))

    process = Process(os.getpid(), start_time(os.getpid()), visible=True)
    monkeypatch.setattr(builtins, "open", refuses)
    alive, found = process.alive(), start_time(process.pid)
    monkeypatch.undo()
    assert alive
    assert found is None
