"""The part of a product of parameters that a default run tries: every pair of values, in far fewer variants."""

from __future__ import annotations

from itertools import combinations, product

from pairwise import pairwise


def pairs(variants: list[dict[str, int]]) -> set[tuple[tuple[str, int], ...]]:
    return {pair for variant in variants for pair in combinations(sorted(variant.items()), 2)}


def variants(**counts: int) -> list[dict[str, int]]:
    return [dict(zip(counts, values, strict=True)) for values in product(*map(range, counts.values()))]


def test_every_pair_is_kept_and_few_variants() -> None:
    whole = variants(size=4, dtype=5, kind=3)
    kept = pairwise(whole, lambda variant: variant)
    assert pairs(kept) == pairs(whole)
    assert 20 <= len(kept) <= 25  # at least sizes times dtypes, of 60
    assert kept == [variant for variant in whole if variant in kept]  # in their order


def test_two_parameters_keep_their_product_and_none_keeps_the_test() -> None:
    assert pairwise(variants(size=3, kind=2), lambda variant: variant) == variants(size=3, kind=2)
    assert pairwise([{}], lambda variant: variant) == [{}]


def test_what_was_left_out_of_a_product_is_not_asked_for() -> None:
    some = [variant for variant in variants(a=2, b=2, c=2) if variant != {"a": 0, "b": 0, "c": 1} and variant["c"]]
    assert pairs(pairwise(some, lambda variant: variant)) == pairs(some)
