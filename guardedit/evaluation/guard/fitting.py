"""Fit the risk model (scikit-learn); nested, grouped cross-validation says how it does on edits it has not seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.linear_model import ElasticNetCV, LogisticRegression
from sklearn.model_selection import GroupKFold

from guardedit.evaluation.guard.association import WORST
from guardedit.evaluation.guard.features import Feature, columns, usable
from guardedit.evaluation.guard.frames import OUT, measured
from guardedit.evaluation.guard.strata import KNOWN, UNKNOWN
from guardedit.records import Scope
from guardedit.risk.calibration import ScopeModel, Term

FOLDS = 5
LEVEL = 0.95
FLOOR_NATS = 1e-8
"""Damage below this is none: a logarithm needs a floor."""
OUTCOMES: dict[Scope, str] = {"far": "far/kl_nats", "near": "near/kl_nats", "subject": "subject/kl_nats"}


@dataclass(frozen=True)
class Line:
    """A fitted sum: one weight a feature, in units of the standardised columns."""

    centre: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    intercept: float

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Expected log damage of each edit."""
        result: np.ndarray = self.intercept + ((raw - self.centre) / self.scale) @ self.weights
        return result


@dataclass(frozen=True)
class Unseen:
    """What models fitted on the other groups say of each edit."""

    log_expected: np.ndarray
    half_width: np.ndarray
    p_harm: np.ndarray
    harm_nats: np.ndarray
    """The limit that the edit's own fold was fitted with."""
    base_rate: np.ndarray
    """Share of harmful edits among those that the fold was fitted on."""


def groups_of(frame: pd.DataFrame) -> np.ndarray:
    """One group a relation: its edits share neighbours."""
    found: np.ndarray = frame["relation"].to_numpy().astype(str)
    return found


def natural_edits(frame: pd.DataFrame, editor: str) -> pd.DataFrame:
    """An editor's edits of natural facts, known and unknown, that have an outcome in every scope."""
    rows = measured(frame, editor, (KNOWN, UNKNOWN))
    there = [rows[f"{OUT}{outcome}"].notna() for outcome in OUTCOMES.values()]
    return rows[np.logical_and.reduce(there)].reset_index(drop=True)


def log_damage(frame: pd.DataFrame, scope: Scope) -> np.ndarray:
    """Measured damage, log nats."""
    values = frame[f"{OUT}{OUTCOMES[scope]}"].to_numpy(dtype=np.float64)
    found: np.ndarray = np.log(np.maximum(values, FLOOR_NATS))
    return found


def fit_line(
    raw: np.ndarray, log: np.ndarray, groups: np.ndarray, features: Sequence[Feature], seed: int
) -> Line:
    """Elastic net whose weights have the sign that each feature's meaning allows; its penalty from inner folds."""
    centre, scale = raw.mean(0), np.maximum(raw.std(0), 1e-12)
    z = (raw - centre) / scale
    # A column twice, once turned over, lets a non-negative solver give it either sign.
    ups = [i for i, f in enumerate(features) if f.sign in ("more", "either")]
    downs = [i for i, f in enumerate(features) if f.sign in ("less", "either")]
    both = np.column_stack([z[:, ups], -z[:, downs]])
    folds = list(GroupKFold(min(FOLDS, len(np.unique(groups)))).split(both, log, groups))
    net = ElasticNetCV(
        l1_ratio=0.5, cv=folds, positive=True, alphas=20, max_iter=20_000, random_state=seed
    ).fit(both, log)
    weights = np.zeros(len(features))
    np.add.at(weights, ups, net.coef_[: len(ups)])
    np.subtract.at(weights, downs, net.coef_[len(ups) :])
    return Line(centre, scale, weights, float(net.intercept_))


def unseen_lines(
    raw: np.ndarray, log: np.ndarray, groups: np.ndarray, features: Sequence[Feature], seed: int
) -> np.ndarray:
    """Each edit's expected log damage by a line fitted without its group."""
    found = np.empty(len(log))
    for train, test in GroupKFold(min(FOLDS, len(np.unique(groups)))).split(raw, log, groups):
        found[test] = fit_line(raw[train], log[train], groups[train], features, seed)(raw[test])
    return found


def cross_validated(
    frame: pd.DataFrame,
    scope: Scope,
    features: Sequence[Feature],
    seed: int = 0,
    harm_nats: float | None = None,
) -> Unseen:
    """Everything that a fitted model says, said of edits of relations that it has not seen; `harm_nats` as in
    `fit_scope`."""
    features = usable(frame, features)
    raw, log, groups = columns(frame, features), log_damage(frame, scope), groups_of(frame)
    out = Unseen(*(np.empty(len(log)) for _ in range(5)))
    for train, test in GroupKFold(min(FOLDS, len(np.unique(groups)))).split(raw, log, groups):
        line = fit_line(raw[train], log[train], groups[train], features, seed)
        inner = unseen_lines(raw[train], log[train], groups[train], features, seed)
        limit = _limit(log[train], harm_nats)
        harmful = log[train] > limit
        slope, offset = _logistic(inner, harmful)
        out.log_expected[test] = line(raw[test])
        out.half_width[test] = conformal(np.abs(log[train] - inner))
        out.p_harm[test] = 1 / (1 + np.exp(-(slope * out.log_expected[test] + offset)))
        out.harm_nats[test] = np.exp(limit)
        out.base_rate[test] = harmful.mean()
    return out


def _bounds(frame: pd.DataFrame, support: Sequence[Feature], without: Collection[str]) -> tuple[Term, ...]:
    idle = usable(frame, [f for f in support if f.score not in without])
    if not idle:
        return ()
    raw = columns(frame, idle)
    return tuple(
        Term(
            score=f.score, transform="log" if f.log else "identity", centre=0.0, scale=1.0, weight=0.0,
            low=float(raw[:, i].min()), high=float(raw[:, i].max()),
        )
        for i, f in enumerate(idle)
    )  # fmt: skip


def fit_scope(
    frame: pd.DataFrame,
    scope: Scope,
    features: Sequence[Feature],
    seed: int = 0,
    support: Sequence[Feature] = (),
    harm_nats: float | None = None,
) -> ScopeModel:
    """The model of one scope, fitted on every edit; its interval and its probabilities from unseen groups.

    Scores of `support` get no weight: they only say whether an edit is like those fitted on. Damage above `harm_nats`
    is harm; without it, what the worst tenth of these edits do.
    """
    features = usable(frame, features)
    raw, log, groups = columns(frame, features), log_damage(frame, scope), groups_of(frame)
    line = fit_line(raw, log, groups, features, seed)
    inner = unseen_lines(raw, log, groups, features, seed)
    limit = _limit(log, harm_nats)
    slope, offset = _logistic(inner, log > limit)
    terms = tuple(
        Term(
            score=f.score, transform="log" if f.log else "identity", centre=float(line.centre[i]),
            scale=float(line.scale[i]), weight=float(line.weights[i]), low=float(raw[:, i].min()),
            high=float(raw[:, i].max()),
        )
        for i, f in enumerate(features)
        if line.weights[i]
    )  # fmt: skip
    terms += _bounds(frame, support, {term.score for term in terms})
    return ScopeModel(
        scope=scope, outcome=OUTCOMES[scope], terms=terms, intercept=line.intercept,
        half_width=conformal(np.abs(log - inner)), level=LEVEL, harm_nats=float(np.exp(limit)), slope=slope,
        offset=offset, n=len(log),
    )  # fmt: skip


def _limit(log: np.ndarray, harm_nats: float | None) -> float:
    return float(np.quantile(log, WORST)) if harm_nats is None else float(np.log(harm_nats))


def conformal(residuals: np.ndarray) -> float:
    """Half width that covers `LEVEL` of new edits: the ⌈(n+1)·level⌉-th smallest residual (the largest, if fewer)."""
    rank = int(np.ceil((len(residuals) + 1) * LEVEL))
    return float(np.sort(residuals)[min(rank, len(residuals)) - 1])


def _logistic(log_expected: np.ndarray, harmful: np.ndarray) -> tuple[float, float]:
    """Slope and offset of P(harm); the base rate where there is nothing to tell apart. Never a falling curve."""
    rate = (harmful.sum() + 0.5) / (len(harmful) + 1)
    flat = 0.0, float(np.log(rate / (1 - rate)))
    if not 0 < harmful.sum() < len(harmful):
        return flat
    fitted = LogisticRegression(C=1.0).fit(log_expected[:, None], harmful)
    slope = float(fitted.coef_[0, 0])
    return (slope, float(fitted.intercept_[0])) if slope > 0 else flat
