"""mpidl: distributed deep learning over the MPI that a cluster already has.

Importing this package starts neither MPI nor torch: each public name is looked up in its module when it is first
used (see `_HOME`). What the names mean stands in their modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` below does the same, later
    from mpidl.arrays.packing import DevicePacked, Packed, pack, unpack
    from mpidl.collectives.communicator import Communicator, world
    from mpidl.collectives.request import Request
    from mpidl.errors import (
        ArgumentError,
        ClosedError,
        DeviceError,
        DtypeError,
        ExtensionError,
        ForkedError,
        LauncherError,
        MismatchError,
        MpidlError,
        NoMPIError,
        RankFailedError,
        SharedMemoryError,
        StalledError,
    )
    from mpidl.parameter_server.adag import ADAG
    from mpidl.parameter_server.aeasgd import AEASGD
    from mpidl.parameter_server.agn import AGN
    from mpidl.parameter_server.dcasgd import DCASGD
    from mpidl.parameter_server.distbelief import DistBelief
    from mpidl.parameter_server.downpour import Downpour
    from mpidl.parameter_server.dynsgd import DynSGD
    from mpidl.parameter_server.eamsgd import EAMSGD
    from mpidl.parameter_server.gem import GEM
    from mpidl.synchronous.local_sgd.diloco import DiLoCo
    from mpidl.synchronous.local_sgd.model_averaging import ModelAveraging
    from mpidl.synchronous.sharded.step import exclusive
    from mpidl.synchronous.synchronous import Synchronous

__version__ = "0.1.0"

_HOME = {
    "world": "collectives.communicator",
    "Communicator": "collectives.communicator",
    "Request": "collectives.request",
    "pack": "arrays.packing",
    "unpack": "arrays.packing",
    "Packed": "arrays.packing",
    "DevicePacked": "arrays.packing",
    "Synchronous": "synchronous.synchronous",
    "exclusive": "synchronous.sharded.step",
    "Downpour": "parameter_server.downpour",
    "AGN": "parameter_server.agn",
    "DynSGD": "parameter_server.dynsgd",
    "ADAG": "parameter_server.adag",
    "AEASGD": "parameter_server.aeasgd",
    "EAMSGD": "parameter_server.eamsgd",
    "DCASGD": "parameter_server.dcasgd",
    "GEM": "parameter_server.gem",
    "DistBelief": "parameter_server.distbelief",
    "ModelAveraging": "synchronous.local_sgd.model_averaging",
    "DiLoCo": "synchronous.local_sgd.diloco",
    "MpidlError": "errors",
    "ArgumentError": "errors",
    "DtypeError": "errors",
    "MismatchError": "errors",
    "StalledError": "errors",
    "RankFailedError": "errors",
    "ClosedError": "errors",
    "ForkedError": "errors",
    "DeviceError": "errors",
    "ExtensionError": "errors",
    "NoMPIError": "errors",
    "SharedMemoryError": "errors",
    "LauncherError": "errors",
}

__all__ = [
    "ADAG",
    "AEASGD",
    "AGN",
    "DCASGD",
    "EAMSGD",
    "GEM",
    "ArgumentError",
    "ClosedError",
    "Communicator",
    "DeviceError",
    "DevicePacked",
    "DiLoCo",
    "DistBelief",
    "Downpour",
    "DtypeError",
    "DynSGD",
    "ExtensionError",
    "ForkedError",
    "LauncherError",
    "MismatchError",
    "ModelAveraging",
    "MpidlError",
    "NoMPIError",
    "Packed",
    "RankFailedError",
    "Request",
    "SharedMemoryError",
    "StalledError",
    "Synchronous",
    "__version__",
    "exclusive",
    "pack",
    "unpack",
    "world",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'mpidl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
