"""The program of the child process that tries MPI on a device's memory: python -m mpidl.mpi.cuda_probe DEVICE SECONDS.

It is started by `cuda_aware` as the only process of an MPI of its own. It ends with 0 only if all data came out right;
an MPI that cannot work on the memory of devices ends it by a signal, or makes it hang.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np

from mpidl.arrays import devices
from mpidl.errors import DeviceError
from mpidl.mpi import runtime

# Elements: a message that is sent at once, and one that waits for its receiver; MPIs treat them by different code.
_COUNTS = (5, 1 << 20)


class _Floats:
    """float32 numbers in memory of the device; `buffer` is how MPI is given them."""

    def __init__(self, mpi: Any, device: devices.Device, numbers: np.ndarray[Any, Any]) -> None:
        self._device = device
        self._memory = devices.Memory(device, 4 * numbers.size)
        self._host = device.pinned(4 * numbers.size).view(np.float32)
        self._host[...] = numbers
        self._copy(self._memory.address, self._host.ctypes.data)
        self.buffer = [mpi.buffer.fromaddress(self._memory.address, 4 * numbers.size), numbers.size, mpi.FLOAT]

    def read(self) -> np.ndarray[Any, Any]:
        """Returns the numbers as they are now."""
        self._host[...] = -1
        self._copy(self._host.ctypes.data, self._memory.address)
        return self._host

    def _copy(self, to: int, from_: int) -> None:
        self._device.copy(to, from_, self._host.nbytes, 0)
        self._device.record(0).wait()


def main(name: str, seconds: int) -> None:
    """Tries everything that mpidl asks of MPI.

    Raises:
        DeviceError: data came out wrong, or the device cannot be used.
        ExtensionError: mpidl was built without CUDA.
    """
    signal.alarm(seconds)  # should the parent be gone; the kernel ends it even inside MPI
    mpi, device = runtime.mpi(), devices.named(name)
    for count in _COUNTS:
        numbers = (np.arange(count) % 97).astype(np.float32)
        _try_moves(mpi, device, numbers)
        _try_sums(mpi, device, numbers)


def _try_moves(mpi: Any, device: devices.Device, numbers: np.ndarray[Any, Any]) -> None:
    """A message to itself, and the collectives, from device to device."""
    comm = mpi.COMM_SELF
    send = _Floats(mpi, device, numbers)
    received = _Floats(mpi, device, np.zeros_like(numbers))
    mpi.Request.Waitall([comm.Irecv(received.buffer, 0), comm.Isend(send.buffer, 0)])
    _expect("a message", received, numbers)
    for start in (comm.Iallgather, comm.Ialltoall, comm.Iallreduce, comm.Ireduce, comm.Ireduce_scatter_block):
        received = _Floats(mpi, device, np.zeros_like(numbers))
        start(send.buffer, received.buffer).Wait()
        _expect(start.__name__, received, numbers)
    comm.Ibcast(send.buffer, 0).Wait()
    _expect("Ibcast", send, numbers)


def _try_sums(mpi: Any, device: devices.Device, numbers: np.ndarray[Any, Any]) -> None:
    """Additions, which no reduction of a single rank makes: MPI's own, on the device, and with memory of MPI's."""
    send, total = _Floats(mpi, device, numbers), _Floats(mpi, device, np.ones_like(numbers))
    host = np.full_like(numbers, 2)
    mpi.SUM.Reduce_local(send.buffer, total.buffer)
    _expect("a sum on the device", total, numbers + 1)
    mpi.SUM.Reduce_local([host, mpi.FLOAT], total.buffer)
    _expect("a sum into the device", total, numbers + 3)
    mpi.SUM.Reduce_local(send.buffer, [host, mpi.FLOAT])
    if not (host == numbers + 2).all():
        raise DeviceError("a sum from the device came out wrong")


def _expect(what: str, found: _Floats, expected: np.ndarray[Any, Any]) -> None:
    if not (found.read() == expected).all():
        raise DeviceError(f"{what} came out wrong")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
