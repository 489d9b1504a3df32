"""Collectives on flat memory: one algorithm, one file; `chosen` says which one carries out a call.

Arrays, results and requests of the user's stand above, in `operations` and `communicator`.
"""

from mpidl.collectives.agreement import Call, describe_reduction, disagreement, number
from mpidl.collectives.chosen import Collectives
from mpidl.collectives.shards import Shards
from mpidl.collectives.sources import Source
from mpidl.collectives.steps import Driven, Steps

__all__ = ["Call", "Collectives", "Driven", "Shards", "Source", "Steps", "describe_reduction", "disagreement", "number"]
