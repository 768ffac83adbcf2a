"""What one measurement has gathered, and how a number becomes a score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from guardedit.drift import latents
from guardedit.drift.behaviour import Summary, TargetBelief
from guardedit.drift.observe import Observation
from guardedit.drift.probes import ProbeSet
from guardedit.records import Scope, Score

WATCHED: tuple[Scope, ...] = ("subject", "near", "far")
"""Scopes that must not change; their latents are tested."""
PROMPTS: tuple[Scope, ...] = ("subject", "near")
NO_PROMPTS = "no prompts of this scope were given"
NO_SAE = "no SAE watches a hook that this edit can move"
NOT_FINITE = "the edited model gives values that are not finite"


@dataclass(frozen=True)
class LatentFindings:
    """Latents of one scope, by SAE in the order of `hook_names`."""

    hook_names: tuple[str, ...]
    counts: tuple[latents.Counts, ...]
    tests: tuple[latents.LatentTests, ...]
    flagged: tuple[latents.Bools, ...]
    """Significant (watched scopes), or moved at the target (target)."""


@dataclass(frozen=True)
class Evidence:
    """Everything that scores are computed from."""

    probes: ProbeSet
    observations: dict[str, Observation]
    domains: tuple[Summary, ...]
    before: tuple[TargetBelief, ...]
    after: tuple[TargetBelief, ...]
    findings: dict[Scope, LatentFindings]
    """By scope; a scope is absent where it could not be tested, and `untested` says why."""
    untested: dict[Scope, str]
    seed: int

    def summary(self, scope: Scope) -> Summary | None:
        """The one summary of a prompt scope."""
        return next((s for s in self.domains if s.scope == scope), None)


def make(
    name: str, value: float | None, unit: str, scope: Scope, *, n: int | None = None,
    bounds: tuple[float, float] | None = None, seed: int | None = None, reason: str | None = None,
) -> Score:  # fmt: skip
    """A post-op score; a value that is not finite becomes a missing one, with the reason."""
    if value is not None and not math.isfinite(value):
        value, reason = None, reason or NOT_FINITE
    if value is None or bounds is None or not np.isfinite(bounds).all():
        bounds = None
    low, high = bounds or (None, None)
    return Score(
        name=name,
        value=value,
        unit=unit,
        stage="postop",
        scope=scope,
        n=n,
        low=low,
        high=high,
        seed=seed,
        reason=reason,
    )
