"""A part of a product of parameters that still shows every pair of values of every two of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

Variant = TypeVar("Variant")
Key = TypeVar("Key", int, str)


def pairwise(variants: Sequence[Variant], values_of: Callable[[Variant], Mapping[Key, Hashable]]) -> list[Variant]:
    """Chooses variants of one test, in their order, such that each pair of values in any variant is in a chosen one.

    Greedy: the next one chosen is the first of those that show most pairs not yet seen. All ranks choose alike, since
    nothing here is drawn by chance.
    """
    pairs = {i: set(combinations(sorted(values_of(variant).items()), 2)) for i, variant in enumerate(variants)}
    if any(len(values_of(variant)) < 3 for variant in variants):
        return list(variants)  # of two parameters the pairs are the product
    unseen, chosen = set().union(*pairs.values()), set()
    while unseen:
        best = max(pairs, key=lambda i: len(pairs[i] & unseen))
        chosen.add(best)
        unseen -= pairs.pop(best)
    return [variant for i, variant in enumerate(variants) if i in chosen]
