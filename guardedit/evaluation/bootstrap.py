"""Intervals: resample the cases, which are the units that were drawn; prompts of one case are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guardedit.records import Record

RESAMPLES = 10_000
_BLOCK = 1_000  # resamples held in memory at once


class Estimate(Record):
    """A mean over cases with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Cases behind the value."""


def estimate(
    values: Sequence[float | None],
    seed: int,
    resamples: int = RESAMPLES,
    *,
    signed: bool = False,
    share: bool = True,
) -> Estimate | None:
    """Mean of the values that are there, with the percentile bootstrap's 95 % interval; None where there are none.

    Where every case gives the same 0 or the same 1, resampling shows no spread at all; the interval then ends at the
    exact (Clopper-Pearson) bound for n cases without a single exception, 1 − 0.025^(1/n) away. Values of a `signed`
    difference could have gone either way, so there both ends move. What is no `share` has no such bound.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return None
    mean = float(known.mean())
    low, high = (float(bound) for bound in np.percentile(_means(known, seed, resamples), (2.5, 97.5)))
    reach = 1 - 0.025 ** (1 / len(known))
    if share and (known == 1).all():
        low = 1 - reach
    elif share and (known == 0).all():
        low, high = (-reach if signed else 0.0), reach
    # Rounding in the resampled sums must not put the mean outside its own interval.
    return Estimate(value=mean, low=min(low, mean), high=max(high, mean), n=len(known))


def _means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of `resamples` draws with replacement."""
    rng, n = np.random.default_rng(seed), len(values)
    sizes = [min(_BLOCK, resamples - start) for start in range(0, resamples, _BLOCK)]
    return np.concatenate([values[rng.integers(0, n, (size, n))].mean(1) for size in sizes])
