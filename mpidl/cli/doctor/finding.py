"""One line of `mpidl doctor`'s report, and how the ranks tell each other what they found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpidl.collectives.communicator import Communicator


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str  # 'ok' | 'WARN' | 'FAIL'
    subject: str
    text: str  # what was found, and what to do if it is not ok
    final: bool = False  # no later check would mean anything


def everywhere(world: Communicator, mine: Any) -> list[Any]:
    """Every rank's value, any that JSON has; a collective."""
    return [json.loads(text) for text in world.topology.gather_bytes(json.dumps(mine).encode(), "mpidl doctor")]
