"""Every exception that mpidl raises of its own accord; nothing else lives here.

Each one is also the nearest built-in exception, so that code which knows nothing of mpidl can catch it.
"""

from __future__ import annotations


class MpidlError(Exception):
    """Base of all exceptions of mpidl."""


class ArgumentError(MpidlError, ValueError):
    """An argument has the right type and a value that cannot work."""


class DtypeError(MpidlError, TypeError):
    """An argument is of a type, or holds elements of a dtype, that the operation does not take."""


class MismatchError(MpidlError, ValueError):
    """The ranks of a communicator made different calls, or calls with different arguments."""


class StalledError(MpidlError, TimeoutError):
    """Some ranks never came to a call in which this rank waited; the message names them."""


class RankFailedError(MpidlError, RuntimeError):
    """Another rank reported a failure, or has left, while this one depended on it."""


class ClosedError(MpidlError, RuntimeError):
    """The object was closed by `finish()` or `free()` and takes no further calls."""


class ForkedError(MpidlError, RuntimeError):
    """A child process, which has no part in MPI, called into mpidl."""


class ExtensionError(MpidlError, ImportError):
    """The compiled extension is missing or does not fit this version of the package."""


class DeviceError(MpidlError, RuntimeError):
    """CUDA itself reported an error."""


class SharedMemoryError(MpidlError, OSError):
    """The ranks of a node cannot share memory: there is not enough of it, or none at all."""


class NoMPIError(MpidlError, ImportError):
    """No MPI library was found, or the one found cannot be loaded."""


class LauncherError(MpidlError, RuntimeError):
    """No launcher was found that can start MPI ranks, or it could not be used."""
