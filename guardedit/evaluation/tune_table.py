"""What tuning found: a row a candidate, with the interval of its score, and the table that is printed."""

from __future__ import annotations

from typing import Any

import numpy as np

from guardedit.evaluation.bootstrap import Estimate
from guardedit.evaluation.metrics import harmonic_mean
from guardedit.records import Record

RESAMPLES = 2_000


class TuneRow(Record):
    """A candidate's figures."""

    name: str
    layer: int
    changed: dict[str, float]
    n: int
    efficacy: float
    paraphrase: float
    neighborhood: float
    score: Estimate
    """Harmonic mean of the three; 95 % percentile bootstrap over facts."""
    seconds_per_edit: float


class Tuned(Record):
    """The outcome: every candidate, the best first."""

    rows: tuple[TuneRow, ...]
    neighborhood_base: float
    """The unedited model's, on all the facts."""
    edits: int
    about: dict[str, Any]

    @property
    def best(self) -> TuneRow:
        """The winner: the best of those that were measured on all facts."""
        return self.rows[0]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, `about` laid open beside the figures."""
        plain = self.model_dump(mode="json")
        about = plain.pop("about")
        return {**plain, **about}


def score_interval(values: np.ndarray, seed: int) -> Estimate:
    """Harmonic mean of the columns' means, with its percentile bootstrap over rows (facts, 3)."""
    value = harmonic_mean(list(values.mean(0)))
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[draws].mean(1)
    low, high = np.percentile([harmonic_mean(list(row)) for row in means], (2.5, 97.5))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(values))


def markdown(found: Tuned) -> str:
    """The candidates as a table."""
    lines = [
        "| candidate | facts | efficacy | paraphrase | neighborhood | score | 95 % interval | seconds an edit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found.rows:
        lines.append(
            f"| {row.name} | {row.n} | {row.efficacy:.3f} | {row.paraphrase:.3f} | {row.neighborhood:.3f} "
            f"| {row.score.value:.3f} | {row.score.low:.3f} to {row.score.high:.3f} | {row.seconds_per_edit:.1f} |"
        )
    return "\n".join([*lines, "", f"Neighborhood of the unedited model: {found.neighborhood_base:.3f}."])
