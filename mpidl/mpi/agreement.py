"""What ranks compare when they must agree: a text as a number, and the sentence that says which ranks differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=1024)
def number(text: str) -> int:
    """Returns a 62-bit number that differs when the text differs; alike on every rank, run and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def disagreement(descriptions: Iterable[str]) -> str:
    """Returns "ranks 0, 2: this; rank 1: that" for the descriptions of ranks 0, 1, 2, ..."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(descriptions):
        by_text.setdefault(text, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items()
    )
