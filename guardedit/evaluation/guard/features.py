"""Which scores a risk model may draw on, how each enters it, and the sets that are held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from guardedit.evaluation.guard.frames import PRED
from guardedit.records import Scope

Sign = Literal["more", "less", "either"]
"""Of the score, what means more risk."""


@dataclass(frozen=True)
class Feature:
    """How one score enters."""

    score: str
    sign: Sign = "more"
    log: bool = True


TRIVIAL = (
    Feature("key_norm", "less"), Feature("delta_norm_ratio"), Feature("conflict_old_nats", "either"),
    Feature("conflict_new_nats", "either"), Feature("subject_tokens", "either", log=False),
    Feature("subject_token_id", "either", log=False), Feature("subject_position", "either", log=False),
    Feature("prompt_tokens", "either", log=False), Feature("hidden_cosine", log=False),
)  # fmt: skip
"""What anybody can read off an edit."""
CLOSED_FORM = (
    Feature("key_leakage"), Feature("key_near_interference"), Feature("leakage_share"), Feature("leakage_tail"),
    Feature("near_interference"), Feature("protected_interference_facts"), Feature("protected_interference_python"),
    Feature("protected_interference_prose"), Feature("neuron_entropy_twin", "either", log=False),
    Feature("overwritten_belief", "either", log=False),
)  # fmt: skip
"""Second moments and keys, no SAE."""
SAE = (
    Feature("latent_leak"), Feature("latent_leak_count", "either"), Feature("leakage_explained", "either", log=False),
    Feature("key_participation", "either"), Feature("sae_view", "either", log=False),
    Feature("neuron_polysemanticity", "either"),
)  # fmt: skip
REHEARSAL = (
    Feature("rehearsed_subject_kl"), Feature("rehearsed_subject_lost_top1", log=False), Feature("rehearsed_near_kl"),
    Feature("rehearsed_near_lost_top1", log=False), Feature("rehearsed_p_new", "either", log=False),
)  # fmt: skip


def _of(*names: str) -> tuple[Feature, ...]:
    every = {f.score: f for f in (*TRIVIAL, *CLOSED_FORM, *SAE, *REHEARSAL)}
    return tuple(every[name] for name in names)


SETS: dict[str, tuple[Feature, ...]] = {
    "trivial": TRIVIAL,
    "no SAE": (*TRIVIAL, *CLOSED_FORM),
    "with SAE": (*TRIVIAL, *CLOSED_FORM, *SAE),
    "no SAE, rehearsed": (*TRIVIAL, *CLOSED_FORM, *REHEARSAL),
    "with SAE, rehearsed": (*TRIVIAL, *CLOSED_FORM, *SAE, *REHEARSAL),
}
MEANT: dict[Scope, tuple[Feature, ...]] = {
    "far": _of("latent_leak", "leakage_share", "key_leakage", "delta_norm_ratio"),
    "near": _of("rehearsed_near_kl", "near_interference", "key_near_interference"),
    "subject": _of(
        "rehearsed_subject_kl", "rehearsed_subject_lost_top1", "conflict_new_nats", "rehearsed_p_new"
    ),
}
"""The few scores that each scope's damage is what they are about: with a hundred edits the others are noise to a fit.
Every plan's risk report holds them; the shipped model's sums draw on nothing else."""
SUPPORT = tuple(f for f in (*CLOSED_FORM, *SAE, *REHEARSAL, *_of("delta_norm_ratio")) if f.sign == "more")
"""Scores of which more means more risk: an edit beyond all edits fitted on, by any of them, is unlike those."""


def usable(frame: pd.DataFrame, features: Sequence[Feature]) -> tuple[Feature, ...]:
    """Those that every edit of the table has a value for, and that differ between edits."""
    return tuple(f for f in features if _complete(frame, f))


def _complete(frame: pd.DataFrame, feature: Feature) -> bool:
    column = f"{PRED}{feature.score}"
    if column not in frame.columns:
        return False
    values = frame[column].to_numpy()
    return bool(np.isfinite(values).all() and values.std() > 0 and (not feature.log or (values > 0).all()))


def columns(frame: pd.DataFrame, features: Sequence[Feature]) -> np.ndarray:
    """(n, features): each score as it enters, not yet centred."""
    found = [frame[f"{PRED}{f.score}"].to_numpy(dtype=np.float64) for f in features]
    return np.column_stack([np.log(v) if f.log else v for v, f in zip(found, features, strict=True)])
