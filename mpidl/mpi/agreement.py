"""What ranks compare when they must agree: texts by their fingerprints, and switches of the environment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from mpidl.errors import ArgumentError
from mpidl.mpi.topology import Topology
from mpidl.native.environment import Variable


@lru_cache(maxsize=1024)
def fingerprint(text: str) -> int:
    """Returns a 62-bit number that differs when the text differs; alike on every rank, run and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def disagreement(descriptions: Iterable[str]) -> str:
    """Returns "ranks 0, 2: this; rank 1: that" for the descriptions of ranks 0, 1, 2, ...; "this" if all are alike."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(descriptions):
        by_text.setdefault(text, []).append(rank)
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items()
    )


def gather_switch(
    ranks: Topology, variable: Variable[bool], what: str, read: Callable[[], bool] | None = None
) -> np.ndarray[Any, Any]:
    """Returns each rank's value of a switch, since users may set the ranks' environments apart; a collective.

    Args:
        ranks: whose values.
        variable: the switch.
        what: the call that waits, for messages.
        read: returns this rank's value; None for what the variable says.

    Raises:
        ArgumentError: the text of some rank makes no sense; raised on every rank.
    """
    error, mine = None, -1
    try:
        mine = int(variable.read() if read is None else read())
    except ArgumentError as found:
        error = found
    values = ranks.gather_words(np.array([mine], np.int64), what)[:, 0]
    if error is not None:
        raise error
    if (values < 0).any():
        raise ArgumentError(f"rank {int(values.argmin())} refused its {variable.name}; see what it says")
    return values.astype(bool)
