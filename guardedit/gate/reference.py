"""A bank of real edits' scores: where a new edit lies among them, and where the shipped limits come from. No torch."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from guardedit.errors import IntegrityError
from guardedit.records import Record, Score

MIN_EDITS = 20
"""A percentile among fewer edits says nothing."""


class ReferenceBank(Record):
    """Scores of real edits of one model by one editor."""

    model: str
    editor: str
    layer: int
    n: int
    """Edits measured."""
    seed: int
    protocol: str
    """Which edits, in words."""
    values: dict[str, tuple[float, ...]]
    """Metric ("preop/leakage") -> sorted values of the edits that have one."""

    def percentile(self, metric: str, value: float) -> float | None:
        """Share of the bank's edits, in percent, whose value is at most `value`; None without enough edits."""
        known = self.values.get(metric, ())
        if len(known) < MIN_EDITS:
            return None
        return 100.0 * bisect.bisect_right(known, value) / len(known)

    def quantile(self, metric: str, share: float) -> float:
        """The value that `share` (0 to 1) of the bank's edits do not exceed, without interpolation."""
        known = self.values[metric]
        return known[min(len(known) - 1, max(0, round(share * len(known)) - 1))]

    @classmethod
    def load(cls, path: Path) -> ReferenceBank:
        """Read a bank; raises IntegrityError where the file cannot be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise IntegrityError(f"the reference bank {path} cannot be read: {error}") from error


def with_percentiles(scores: Iterable[Score], bank: ReferenceBank | None) -> tuple[Score, ...]:
    """The scores, each with its place among the bank's edits where it has one."""
    return tuple(_placed(score, bank) for score in scores)


def _placed(score: Score, bank: ReferenceBank | None) -> Score:
    if bank is None or score.value is None:
        return score
    stage = "postop" if score.stage == "postop" else "preop"
    place = bank.percentile(f"{stage}/{score.name}", score.value)
    return score if place is None else score.model_copy(update={"percentile": place})
