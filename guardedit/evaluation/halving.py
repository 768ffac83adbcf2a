"""Successive halving (Jamieson and Talwalkar 2016): every candidate on few facts, the better half on twice as many.

A candidate's first facts are those of every other, in one fixed order, so candidates are always compared on the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

C = TypeVar("C")


def halve(
    candidates: Sequence[C], score: Callable[[C, int], float], *, first: int, most: int, keep: int
) -> list[C]:
    """The best `keep` candidates, best first; `score(candidate, n)` judges one on the first n facts.

    Rounds have `first` facts, then twice as many, up to `most`. Of equal scores the earlier candidate stays.
    """
    left, n = list(candidates), min(first, most)
    while True:
        scores = [score(candidate, n) for candidate in left]
        ranked = sorted(range(len(left)), key=lambda at: -scores[at])
        size = max(keep, (len(left) + 1) // 2) if len(left) > keep else keep
        left = [left[at] for at in ranked[:size]]
        if len(left) <= keep:
            return left
        n = min(2 * n, most)


def planned(n_candidates: int, *, first: int, most: int, keep: int) -> int:
    """How many (candidate, fact) pairs `halve` judges in all, each counted once."""
    total, left, n, before = 0, n_candidates, min(first, most), 0
    while True:
        total, before = total + left * (n - before), n
        if left > keep:
            left = max(keep, (left + 1) // 2)
        if left <= keep:
            return total
        n = min(2 * n, most)
