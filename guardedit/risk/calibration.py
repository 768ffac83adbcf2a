"""From scores to expected damage: a small monotone model, fitted on edits whose damage was measured, all in numbers.

log damage = intercept + Σ weight · z, where z is a score (its logarithm where it spans decades), centred and scaled.
Weights of scores that mean more risk are never negative. Beside the expectation stand a conformal interval (Lei et al.
2018, "Distribution-Free Predictive Inference for Regression", split form with out-of-fold residuals) and the
probability of harm: damage as the worst tenth of measured edits did, these or others. Where a score is riskier
than any that it was fitted on, the model has no opinion; where one is safer, it counts as the safest of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from guardedit.errors import IntegrityError
from guardedit.records import Digest, Record, Scope, Score, canonical, digest_of_bytes

SLACK = 0.05
"""A score may lie this share of the fitted range outside of it before the model declines."""


class Term(Record):
    """One score's part in the sum."""

    score: str
    transform: Literal["log", "identity"]
    centre: float
    scale: float
    weight: float
    """0 for a score that only says whether the edit is like those fitted on; more of it is then riskier."""
    low: float
    """The least value, transformed, among the edits fitted on."""
    high: float

    def transformed(self, value: float) -> float:
        """The score as it enters the sum; raises ValueError for the logarithm of what is not positive."""
        if self.transform == "identity":
            return value
        if value <= 0:
            raise ValueError(f"{self.score} is {value}; its logarithm is not defined")
        return math.log(value)

    def part(self, value: float) -> float:
        """weight · z, where a score that is safer than any fitted on counts as the safest of those."""
        inside = self.transformed(value)
        inside = max(inside, self.low) if self.weight > 0 else min(inside, self.high)
        return self.weight * (inside - self.centre) / self.scale

    def supports(self, value: float) -> bool:
        """Whether edits as risky by this score were among those fitted on."""
        room, found = SLACK * (self.high - self.low), self.transformed(value)
        return found <= self.high + room if self.weight >= 0 else found >= self.low - room


class ScopeModel(Record):
    """Expected damage in one scope."""

    scope: Scope
    outcome: str
    """What was measured, e.g. "near/kl_nats"; the unit is nats."""
    terms: tuple[Term, ...]
    intercept: float
    half_width: float
    """Of the conformal interval, in log units: this share of new edits of the same kind lies inside at `level`."""
    level: float
    harm_nats: float
    """Damage above it is harm: the worst tenth of the edits fitted on lie above, or of another editor's."""
    slope: float
    """Of the logistic curve from expected log damage to the probability of harm."""
    offset: float
    n: int


class Worth(Record):
    """How well one score alone ordered the damage in one scope."""

    score: str
    scope: Scope
    spearman: float
    low: float
    """95 % interval, bootstrap over relations."""
    high: float
    n: int

    @property
    def in_words(self) -> str:
        """One line for a reviewer."""
        figures = f"{self.spearman:.2f} ({self.low:.2f} to {self.high:.2f}), n {self.n}"
        if self.low <= 0 <= self.high:
            return f"said nothing sure of {self.scope} damage: rank correlation {figures}"
        return f"ordered {self.scope} damage by rank correlation {figures}"


class Expectation(Record):
    """What the model says of one edit in one scope; no value where it has no opinion."""

    scope: Scope
    outcome: str
    value: float | None
    """Nats."""
    low: float | None = None
    high: float | None = None
    p_harm: float | None = None
    reason: str | None = None


class RiskModel(Record):
    """A model per scope, and what it was fitted on."""

    model: str
    editor: str
    layers: tuple[int, ...]
    """That the edits wrote, in order."""
    protocol: str
    seed: int
    scopes: tuple[ScopeModel, ...]
    worth: tuple[Worth, ...] = ()
    """Of single scores."""
    rows_digest: Digest
    """Of the measured edits."""

    @property
    def digest(self) -> str:
        """Of the canonical bytes."""
        return digest_of_bytes(canonical(self))

    def expect(self, scores: Mapping[str, float | None]) -> tuple[Expectation, ...]:
        """The expected damage of an edit with these scores, scope by scope."""
        return tuple(_expect(one, scores) for one in self.scopes)

    def evidence(self, scores: Iterable[Score]) -> dict[str, str]:
        """Score -> what it has been worth: in its own scope, else in the one that it ordered best."""
        found = {}
        for score in scores:
            known = [one for one in self.worth if one.score == score.name]
            own = [one for one in known if one.scope == score.scope]
            if known:
                found[score.name] = (own or [max(known, key=lambda one: abs(one.spearman))])[0].in_words
        return found

    @classmethod
    def load(cls, path: Path) -> RiskModel:
        """Read a model; raises IntegrityError where the file cannot be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise IntegrityError(
                f"the risk model {path} cannot be read: {error}; fit it again: guardedit calibrate"
            ) from error


def _expect(model: ScopeModel, scores: Mapping[str, float | None]) -> Expectation:
    reason = _objection(model, scores)
    if reason is not None:
        return Expectation(scope=model.scope, outcome=model.outcome, value=None, reason=reason)
    log = model.intercept + math.fsum(t.part(scores[t.score] or 0.0) for t in model.terms)
    return Expectation(
        scope=model.scope,
        outcome=model.outcome,
        value=math.exp(log),
        low=math.exp(log - model.half_width),
        high=math.exp(log + model.half_width),
        p_harm=1 / (1 + math.exp(-(model.slope * log + model.offset))),
    )


def _objection(model: ScopeModel, scores: Mapping[str, float | None]) -> str | None:
    """Why there is no opinion, if so."""
    for term in model.terms:
        value = scores.get(term.score)
        if value is None or not math.isfinite(value):
            return f"{term.score} has no value"
        if term.transform == "log" and value <= 0:
            return f"{term.score} is {value:.3g}, outside the calibration's support"
        if not term.supports(value):
            low, high = (math.exp(b) if term.transform == "log" else b for b in (term.low, term.high))
            return (
                f"{term.score} is {value:.3g}, outside the calibration's support of {low:.3g} to {high:.3g}"
            )
    return None
