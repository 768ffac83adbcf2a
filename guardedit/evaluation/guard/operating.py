"""What a policy would have done to edits whose damage is known: how many it stops, and how much damage with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from guardedit.evaluation.guard.association import WORST
from guardedit.evaluation.guard.features import MEANT
from guardedit.evaluation.guard.fitting import OUTCOMES, cross_validated, log_damage
from guardedit.evaluation.guard.frames import PRED
from guardedit.gate.policy import Policy, judge
from guardedit.pipeline.expecting import HARM
from guardedit.records import Judgement, Scope, Score
from guardedit.risk.measure import SCORES

_MANY = 1_000_000
"""Units behind a score: how many there were is not in the table, and no limit may fail for that."""


def with_harm(frame: pd.DataFrame, seed: int = 0, harm: Mapping[Scope, float] | None = None) -> pd.DataFrame:
    """The edits with the risk model's probability of harm, each said by a model that saw no edit of its relation.

    `harm`: the damage in nats that counts as such, by scope; without it, what the worst tenth of these edits do.
    """
    limits = harm or {}
    said = [cross_validated(frame, one, MEANT[one], seed, limits.get(one)).p_harm for one in OUTCOMES]
    return frame.assign(**{f"{PRED}{HARM}": np.max(said, axis=0)})


def judgements(frame: pd.DataFrame, policy: Policy) -> list[Judgement]:
    """Every edit judged before the write, as a plan of one request by its editor would be."""
    now = datetime.now(UTC)
    return [
        judge(_scores(row), policy, (), "preop", now, "one", row["editor"]) for _, row in frame.iterrows()
    ]


def _scores(row: Mapping[str, Any]) -> list[Score]:
    found = []
    for name, rule in SCORES.items():
        value = row.get(f"{PRED}{name}")
        known = value is not None and math.isfinite(value)
        found.append(
            Score(
                name=name, value=value if known else None, unit=rule.unit, stage=rule.stage, scope=rule.scope,
                n=_MANY, reason=None if known else "not measured",
            )
        )  # fmt: skip
    harm = row.get(f"{PRED}{HARM}")
    if harm is not None:
        found.append(
            Score(name=HARM, value=harm, unit="probability", stage="rehearsal", scope="model", n=_MANY)
        )
    return found


def stopped_by_rule(judged: list[Judgement]) -> dict[str, np.ndarray]:
    """Rule -> which edits break it."""
    rules = dict.fromkeys(finding.rule for one in judged for finding in one.findings)
    return {
        rule: np.array([any(f.rule == rule and f.verdict == "fail" for f in one.findings) for one in judged])
        for rule in rules
    }


def gate_figures(frame: pd.DataFrame, stopped: np.ndarray) -> dict[str, float]:
    """Share stopped and, by scope, share of the damage avoided and of the worst tenth caught."""
    found = {"stopped": float(stopped.mean())}
    for scope in OUTCOMES:
        damage = np.exp(log_damage(frame, scope))
        worst = damage > np.quantile(damage, WORST)
        found[f"{scope} avoided"] = float(damage[stopped].sum() / damage.sum())
        found[f"{scope} worst caught"] = float(stopped[worst].mean()) if worst.any() else float("nan")
    return found
