"""One score = one function and one entry in a table. A score that fails says why and hides no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from guardedit.errors import BadRequestError, GuardeditError
from guardedit.records import Scope, Score, Stage

View = TypeVar("View")


@dataclass(frozen=True)
class Measured:
    """What a score function returns."""

    value: float
    n: int | None = None
    """Independent units behind the value."""
    low: float | None = None
    high: float | None = None
    """95 % interval."""
    reason: str | None = None
    """A remark on its validity."""


@dataclass(frozen=True)
class ScoreRule(Generic[View]):
    """How one score is measured and what it is about."""

    measure: Callable[[View], Measured]
    stage: Stage
    scope: Scope
    unit: str
    worst: Literal["max", "min"] = "max"
    """Which of several requests' values stands for all of them."""

    @property
    def formula(self) -> str:
        """The first paragraph of the function's docstring."""
        return (self.measure.__doc__ or "").split("\n\n")[0]


def measure_all(rules: Mapping[str, ScoreRule[View]], view: View, seed: int) -> tuple[Score, ...]:
    """Every score of a table, in its order.

    A score that cannot be measured, or is not finite, has no value and says why. Errors of the request itself
    (BadRequestError) and programming errors are raised.
    """
    return tuple(_measure(name, rule, view, seed) for name, rule in rules.items())


def _measure(name: str, rule: ScoreRule[View], view: View, seed: int) -> Score:
    try:
        found = rule.measure(view)
    except BadRequestError:
        raise
    except (GuardeditError, ArithmeticError, LinAlgError) as error:
        return _missing(name, rule, seed, f"not measured: {error}")
    if not math.isfinite(found.value):
        return _missing(name, rule, seed, f"not measured: it came out as {found.value}")
    return Score(
        name=name,
        value=found.value,
        unit=rule.unit,
        stage=rule.stage,
        scope=rule.scope,
        n=found.n,
        low=_finite(found.low),
        high=_finite(found.high),
        seed=seed,
        reason=found.reason,
    )


def _missing(name: str, rule: ScoreRule[View], seed: int, reason: str) -> Score:
    return Score(
        name=name, value=None, unit=rule.unit, stage=rule.stage, scope=rule.scope, seed=seed, reason=reason
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def worst_of(rule: ScoreRule[View], scores: Sequence[Score], labels: Sequence[str]) -> Score:
    """One score for several requests: the worst value, naming its request; no value where any is missing."""
    if len(scores) == 1:
        return scores[0]
    missing = next((i for i, score in enumerate(scores) if score.value is None), None)
    if missing is not None:
        return scores[missing].model_copy(update={"reason": f"{labels[missing]}: {scores[missing].reason}"})
    pick = max if rule.worst == "max" else min
    index = pick(range(len(scores)), key=lambda i: scores[i].value or 0.0)
    remark = f"the worst of {len(scores)} requests: {labels[index]}"
    old = scores[index].reason
    return scores[index].model_copy(update={"reason": f"{remark}; {old}" if old else remark})


def mean_with_interval(values: Sequence[float], seed: int, resamples: int = 1000) -> Measured:
    """Mean with its 95 % percentile bootstrap interval over the values; raises ZeroDivisionError without any."""
    import numpy as np

    if not values:
        raise ZeroDivisionError("no prompts in this scope")
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Measured(float(data.mean()), len(data), float(low), float(high))
