"""Collectives on flat memory: one algorithm, one file; `dispatch` says which one carries out a call.

The arrays, results and requests that users see are in `operations` and `communicator`.
"""

from mpidl.collectives.dispatch import Collectives
from mpidl.collectives.gather_list import GatherList
from mpidl.collectives.mismatch import Call, describe_reduction
from mpidl.collectives.sharded import Shards
from mpidl.collectives.tasks import RunningTask, Task
from mpidl.mpi.agreement import disagreement, fingerprint

__all__ = [
    "Call",
    "Collectives",
    "GatherList",
    "RunningTask",
    "Shards",
    "Task",
    "describe_reduction",
    "disagreement",
    "fingerprint",
]
