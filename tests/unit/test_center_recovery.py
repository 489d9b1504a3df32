"""Processes that are killed, really, while they change a variable in shared memory: what they leave is whole, or
is said not to be.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time

import numpy as np
import pytest

from mpidl.native import library as _native

pytestmark = pytest.mark.any_mpi

COUNT, BLOCK = 1 << 16, 1 << 14  # of float64: four blocks of 128 KiB
KILLS = 60
PARENT, CHILD = 1, 2  # marks


def view(memory, mark):
    address = int(_native.ffi.cast("uintptr_t", _native.ffi.from_buffer(memory)))
    return _native.ffi.new("mpidl_center *", (address, COUNT, BLOCK, _native.DTYPES["float64"], mark))


def passed(values=0, after=0):
    return _native.ffi.new("mpidl_pass *", (0, COUNT, values, 0, after, 1.0, 0, 0, 0))


def child_that(memory, adds):
    """Adds ones to all, or reads all, again and again, until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            center, ones, move = view(memory, CHILD), np.ones(COUNT), _native.library().mpidl_center_move
            while True:
                one = passed(values=ones.ctypes.data if adds else 0, after=0 if adds else ones.ctypes.data)
                while move(center, one, 1_000_000):
                    pass
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize("adds", [True, False])
def test_what_the_killed_leave_is_whole_or_refused(adds):
    library, draw = _native.library(), random.Random(0)
    nbytes = int(library.mpidl_center_nbytes(COUNT, BLOCK, _native.DTYPES["float64"]))
    found = {"free": 0, "taken away": 0, "half": 0}
    for _ in range(KILLS):
        memory, out = mmap.mmap(-1, nbytes), np.empty(COUNT)
        center = view(memory, PARENT)
        pid = child_that(memory, adds)
        time.sleep(0.002 + 0.004 * draw.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        one, how, whole = passed(after=out.ctypes.data), "free", COUNT
        while library.mpidl_center_move(center, one, 0):
            assert one.waits_for == CHILD
            if library.mpidl_center_take_away(center, one, CHILD):
                how, whole = "half", one.done
                break
            how = "taken away"
        found[how] += 1
        for at in range(0, whole, BLOCK):
            assert (out[at : at + BLOCK] == out[at]).all()  # a block is never seen half changed
        del center, one

    assert found["half" if adds else "taken away"] > 0
    assert adds or found["half"] == 0  # a reader leaves whole blocks
    assert sum(found.values()) == KILLS
