"""Collectives on flat memory: one algorithm, one file; `dispatch` says which one carries out a call.

Arrays, results and requests of the user's stand above, in `operations` and `communicator`.
"""

from mpidl.collectives.dispatch import Collectives
from mpidl.collectives.gather_list import Source
from mpidl.collectives.mismatch import Call, describe_reduction
from mpidl.collectives.sharded import Shards
from mpidl.collectives.tasks import Driven, Steps
from mpidl.mpi.agreement import disagreement, number

__all__ = ["Call", "Collectives", "Driven", "Shards", "Source", "Steps", "describe_reduction", "disagreement", "number"]
