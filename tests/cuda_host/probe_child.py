"""What stands for mpidl.mpi.cuda_probe in the tests: the same program on the host's CUDA, with an MPI of a chosen kind.

probe_child.py KIND DEVICE SECONDS. Kinds: aware, MPI may touch the device's memory; unaware, it may not, and the first
attempt is a segmentation fault; lossy, it may, and does not add; refuses; hangs.
"""

from __future__ import annotations

import contextlib
import sys
import time
from types import SimpleNamespace

from host_build import host_cuda, shared

from mpidl.arrays import devices
from mpidl.mpi import cuda_probe, runtime


def main(kind: str, name: str, seconds: int) -> None:
    if kind == "refuses":
        sys.exit(1)
    if kind == "hangs":
        time.sleep(1000)
    devices.register(name.partition(":")[0], lambda number: devices.Device(host_cuda(), number, lambda _: 0))
    if kind == "lossy":
        known = runtime.mpi()
        names = ("COMM_SELF", "FLOAT", "Request", "buffer")
        lossy = SimpleNamespace(
            SUM=SimpleNamespace(Reduce_local=lambda *_: None), **{one: getattr(known, one) for one in names}
        )
        runtime.mpi = lambda: lossy
    with contextlib.nullcontext() if kind == "unaware" else shared():
        cuda_probe.main(name, seconds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
