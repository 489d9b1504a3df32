"""How far one backward pass has come on this rank; `reducer` moves it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mpidl.synchronous.reduction.header import Header


@dataclass
class Round:
    """One backward pass."""

    get_header: Callable[[bool], Header | None]
    weight: int
    header: Header | None = None
    launched: int = 0  # buckets
    fired: dict[int, None] = field(default_factory=dict)  # parameters, in the order of their gradients
    late: set[int] = field(default_factory=set)  # buckets that changed after they were launched
    dropped: int = 0  # the first so many buckets were launched with gradients that were thrown away

    def restart(self) -> None:
        """Forgets this rank's gradients; what was launched with them must be done again."""
        self.late.update(range(self.launched))
        self.fired.clear()
        self.dropped = self.launched
