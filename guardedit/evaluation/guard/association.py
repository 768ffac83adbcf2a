"""How well one number known beforehand orders the damage measured afterwards, with grouped bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1_000
WORST = 0.9
"""The worst decile is what an alarm is for."""

Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Figure:
    """A statistic with its 95 % interval over resampled groups."""

    value: float
    low: float
    high: float
    n: int


def spearman(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Rank correlation, ties averaged; NaN where one side is constant."""
    a, b = rankdata(predicted), rankdata(observed)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def auroc(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Area under the ROC curve for what happened (1) against what did not (0); NaN where one of them is missing."""
    worst = happened.astype(bool)
    n = int(worst.sum())
    if not 0 < n < len(worst):
        return float("nan")
    # As roc_auc_score gives it, by ranks: resampling pays for it two thousand times.
    return float((rankdata(predicted)[worst].sum() - n * (n + 1) / 2) / (n * (len(worst) - n)))


def auroc_worst(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Area under the ROC curve for the worst decile of the damage; NaN where there is no such part."""
    return auroc(predicted, observed > np.quantile(observed, WORST))


def figure(
    statistic: Statistic, predicted: np.ndarray, observed: np.ndarray, groups: np.ndarray, seed: int = 0
) -> Figure | None:
    """A statistic over the edits with a value, its interval from resampling whole groups; None under 10 edits."""
    there = np.isfinite(predicted) & np.isfinite(observed)
    if there.sum() < 10:
        return None
    value = statistic(predicted[there], observed[there])
    drawn = [
        statistic(predicted[kept], observed[kept])
        for rows in _resampled(tuple(groups), seed)
        if len(kept := rows[there[rows]])
    ]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Figure(value, float(low), float(high), int(there.sum()))


def gain(
    statistic: Statistic,
    better: np.ndarray,
    plain: np.ndarray,
    observed: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
) -> Figure:
    """`better` less `plain` by the same statistic, on the same resampled groups."""
    drawn = [
        statistic(better[rows], observed[rows]) - statistic(plain[rows], observed[rows])
        for rows in _resampled(tuple(groups), seed)
    ]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    value = statistic(better, observed) - statistic(plain, observed)
    return Figure(value, float(low), float(high), len(observed))


@lru_cache(maxsize=16)
def _resampled(groups: tuple[object, ...], seed: int) -> list[np.ndarray]:
    """Rows of groups drawn with replacement; kept, as every score of a table asks for the same."""
    rng = np.random.default_rng(seed)
    column = np.asarray(groups)
    names = np.unique(column)
    members = [np.flatnonzero(column == name) for name in names]
    picks = rng.integers(0, len(names), (RESAMPLES, len(names)))
    return [np.concatenate([members[i] for i in pick]) for pick in picks]
