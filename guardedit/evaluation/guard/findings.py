"""The benchmark's figures: each score alone, the fitted models, and what stopping the riskiest edits would avoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from guardedit.evaluation.guard.association import Figure, Statistic, auroc_worst, figure, gain, spearman
from guardedit.evaluation.guard.features import SETS, Feature
from guardedit.evaluation.guard.fitting import OUTCOMES, Unseen, cross_validated, groups_of, log_damage
from guardedit.evaluation.guard.frames import OUT, PRED
from guardedit.records import Scope


def alone(frame: pd.DataFrame, outcome: str, statistic: Statistic, seed: int = 0) -> dict[str, Figure]:
    """Each score by itself against an outcome, the most telling first; scores with too few values are not there."""
    observed, groups = frame[f"{OUT}{outcome}"].to_numpy(dtype=np.float64), groups_of(frame)
    found = {
        column.removeprefix(PRED): figure(
            statistic, frame[column].to_numpy(dtype=np.float64), observed, groups, seed
        )
        for column in frame.columns
        if column.startswith(PRED)
    }
    known = {name: one for name, one in found.items() if one is not None and np.isfinite(one.value)}
    return dict(sorted(known.items(), key=lambda pair: -abs(pair[1].value)))


def fitted(
    frame: pd.DataFrame,
    scope: Scope,
    features: Sequence[Feature],
    seed: int = 0,
    harm_nats: float | None = None,
) -> dict[str, Any]:
    """A set of scores in the model, on edits of relations that it has not seen; `harm_nats` as in `fit_scope`."""
    said, log, groups = (
        cross_validated(frame, scope, features, seed, harm_nats),
        log_damage(frame, scope),
        groups_of(frame),
    )
    harmful = np.exp(log) > said.harm_nats
    covered = np.abs(log - said.log_expected) <= said.half_width
    return {
        "spearman": asdict_or_none(figure(spearman, said.log_expected, log, groups, seed)),
        "auroc": asdict_or_none(figure(auroc_worst, said.log_expected, log, groups, seed)),
        "inside_relations": inside(said.log_expected, log, groups),
        "brier_skill": asdict_or_none(_brier_skill(said, harmful, groups, seed)),
        "coverage": asdict_or_none(
            figure(_mean_of_first, covered.astype(float), covered.astype(float), groups, seed)
        ),
        "n": len(log),
    }


def asdict_or_none(found: Figure | None) -> dict[str, float] | None:
    """For a document."""
    return None if found is None else asdict(found)


def _mean_of_first(values: np.ndarray, _: np.ndarray) -> float:
    return float(values.mean())


def _brier_skill(said: Unseen, harmful: np.ndarray, groups: np.ndarray, seed: int) -> Figure | None:
    """1 − Brier / Brier of the base rate, as the other folds have it; none where no edit did harm, or every one."""
    if harmful.all() or not harmful.any():
        return None
    losses = (np.square(said.p_harm - harmful), np.square(said.base_rate - harmful))
    return figure(lambda own, base: float(1 - own.mean() / base.mean()), *losses, groups, seed)


def inside(predicted: np.ndarray, observed: np.ndarray, groups: np.ndarray) -> dict[str, float] | None:
    """Rank correlation within a relation, averaged over relations of eight edits or more, weighted by their edits."""
    found = []
    for name in np.unique(groups):
        rows = groups == name
        if rows.sum() >= 8:
            found.append((spearman(predicted[rows], observed[rows]), int(rows.sum())))
    if not found:
        return None
    values, sizes = np.array([v for v, _ in found]), np.array([n for _, n in found])
    return {"value": float(np.average(values, weights=sizes)), "relations": len(found), "n": int(sizes.sum())}


def gains(frame: pd.DataFrame, scope: Scope, seed: int = 0) -> dict[str, dict[str, float]]:
    """What SAE scores add to the same set without them, on unseen relations: Spearman and AUROC."""
    log, groups = log_damage(frame, scope), groups_of(frame)
    found = {}
    for better, plain in (("with SAE", "no SAE"), ("with SAE, rehearsed", "no SAE, rehearsed")):
        a, b = (cross_validated(frame, scope, SETS[name], seed).log_expected for name in (better, plain))
        found[f"{better} less {plain}: Spearman"] = asdict(gain(spearman, a, b, log, groups, seed))
        found[f"{better} less {plain}: AUROC"] = asdict(gain(auroc_worst, a, b, log, groups, seed))
    return found


def avoided(risk: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Share of the total damage that is avoided when the riskiest i edits are stopped, for i = 0 … n."""
    ordered = damage[np.argsort(-risk, kind="stable")]
    return np.concatenate([[0.0], np.cumsum(ordered) / ordered.sum()])


def combined_risk(expected: dict[Scope, np.ndarray]) -> np.ndarray:
    """One number an edit: its expected damage in every scope, each in units of that scope's mean."""
    parts = [np.exp(log) / np.exp(log).mean() for log in expected.values()]
    total: np.ndarray = np.mean(parts, axis=0)
    return total


def stopping(
    frame: pd.DataFrame, features: Mapping[Scope, Sequence[Feature]], share: float = 0.2, seed: int = 0
) -> dict[str, Any]:
    """Stop the riskiest `share` by one combined number: damage avoided in each scope, beside chance and an oracle."""
    expected = {
        scope: cross_validated(frame, scope, features[scope], seed).log_expected for scope in OUTCOMES
    }
    risk, at = combined_risk(expected), round(share * len(frame))
    found: dict[str, Any] = {"share": at / len(frame), "n": len(frame)}
    for scope in OUTCOMES:
        damage = np.exp(log_damage(frame, scope))
        found[scope] = {
            "avoided": float(avoided(risk, damage)[at]),
            "own_model": float(avoided(expected[scope], damage)[at]),
            "oracle": float(avoided(damage, damage)[at]),
            "curve": avoided(risk, damage)[:: max(1, len(frame) // 50)].round(4).tolist(),
        }
    return found
