"""Scores of what SAEs and raw activations see: drifted latents, spill, omnibus, the SAEs' own validity, raw shifts."""

from __future__ import annotations

import math

import numpy as np
import torch

from guardedit.drift import latents
from guardedit.drift.evidence import NO_SAE, PROMPTS, WATCHED, Evidence, make
from guardedit.records import Scope, Score


def latent_scores(evidence: Evidence) -> list[Score]:
    """How many latents drifted where none should, how much of it is the target's own, and one omnibus a scope."""
    scores: list[Score] = []
    for scope in WATCHED:
        found = evidence.findings.get(scope)
        reason = None if found else evidence.untested.get(scope, NO_SAE)
        n = evidence.observations[scope].rows.n_rows if scope in evidence.observations else 0
        # `near` on its own line below: it counts the subject's other relations too.
        number = float(sum(int(f.sum()) for f in found.flagged)) if found else None
        if scope != "near":
            scores.append(
                make(
                    f"drifted_latents_{scope}", number, "count", scope, n=n, seed=evidence.seed, reason=reason
                )
            )
        total = latents.omnibus(found.tests) if found else None
        scores.append(make(f"omnibus_{scope}", total, "latents/token", scope, n=n, reason=reason))
        scores.append(_energy(evidence, scope, n, reason))
    return [*scores, _drifted_near(evidence), _spill(evidence)]


def _drifted_near(evidence: Evidence) -> Score:
    """Latents that drifted on near prompts or on the subject's other relations, each counted once."""
    found = [evidence.findings[s] for s in PROMPTS if s in evidence.findings]
    missing = [evidence.untested.get(s, NO_SAE) for s in PROMPTS if s not in evidence.findings]
    n = sum(evidence.observations[s].rows.n_rows for s in PROMPTS if s in evidence.observations)
    if "near" not in evidence.findings:
        return make("drifted_latents_near", None, "count", "near", n=n, reason="; ".join(missing))
    either = [np.logical_or.reduce([f.flagged[i] for f in found]) for i in range(len(found[0].flagged))]
    remark = f"near prompts only: {missing[0]} (subject)" if missing else None
    count = float(sum(int(e.sum()) for e in either))
    return make("drifted_latents_near", count, "count", "near", n=n, seed=evidence.seed, reason=remark)


def _energy(evidence: Evidence, scope: Scope, n: int, reason: str | None) -> Score:
    """Largest energy distance of sequence-mean codes over SAEs, relative to the reference's own mean norm."""
    found = evidence.findings.get(scope)
    if found is None:
        return make(f"energy_{scope}", None, "ratio", scope, n=n, reason=reason)
    hooks = evidence.observations[scope].hooks
    pairs = [[torch.cat(side) for side in zip(*hooks[name].means, strict=True)] for name in found.hook_names]
    results = [
        (latents.energy_distance(a, b, evidence.seed), float(a.double().norm(dim=1).mean())) for a, b in pairs
    ]
    value, p = max((energy / size if size else 0.0, p) for (energy, p), size in results)
    return make(
        f"energy_{scope}", value, "ratio", scope, n=n, seed=evidence.seed, reason=f"label-swap p = {p:.3g}"
    )


def _spill(evidence: Evidence) -> Score:
    """Firings per token of the target's own latents that changed outside the target; mean over SAEs, worst scope."""
    target = evidence.findings.get("target")
    watched = {s: evidence.findings[s] for s in WATCHED if s in evidence.findings}
    if target is None or not watched:
        reason = evidence.untested.get("target", NO_SAE) if target is None else NO_SAE
        return make("spill_mass", None, "latents/token", "near", reason=reason)
    masses = {scope: latents.switched(found.counts, target.flagged) for scope, found in watched.items()}
    worst = max(masses, key=masses.__getitem__)
    return make("spill_mass", masses[worst], "latents/token", worst,
                n=evidence.observations[worst].rows.n_rows, reason=f"largest of {', '.join(masses)}")  # fmt: skip


def validity_score(evidence: Evidence) -> Score:
    """Whether the SAEs still see the edited model: the largest of FVU after/before (far, near) and 1 + |ΔL0|/L0 (far).

    Above 1.1 an SAE reconstructs the edited model more than a tenth worse, or fires a tenth more or less often.
    """
    measured: dict[str, float] = {}
    scopes: tuple[Scope, ...] = ("far", "near")
    for scope in scopes:
        found = evidence.findings.get(scope)
        if found is None:
            if scope == "far":
                return make("sae_validity", None, "ratio", "far", reason=evidence.untested.get("far", NO_SAE))
            continue
        for name, tests in zip(found.hook_names, found.tests, strict=True):
            hook = evidence.observations[scope].hooks[name]
            measured[f"FVU at {name}, {scope}"] = _ratio(hook.after.fvu, hook.before.fvu)
            if scope == "far":
                l0 = _ratio(float(tests.rate_after.sum()), float(tests.rate_before.sum()))
                measured[f"L0 at {name}, far"] = 1 + abs(l0 - 1)
    worst = max(measured, key=lambda what: _nan_last(measured[what]))
    n = evidence.observations["far"].rows.n_rows
    return make("sae_validity", measured[worst], "ratio", "far", n=n, reason=f"largest: {worst}")


def _ratio(after: float, before: float) -> float:
    return after / before if before else (1.0 if after == before else math.nan)


def shift_scores(evidence: Evidence) -> list[Score]:
    """Relative L2 change of raw activations, ‖x' − x‖/‖x‖: needs no SAE; by hook on control text, and the largest."""
    far, n = evidence.observations["far"].hooks, evidence.observations["far"].rows.n_rows
    scores = [make(f"raw_shift_{scope}", max((h.shift for h in seen.hooks.values()), key=_nan_last), "ratio", scope,
                   n=seen.rows.n_rows)
              for scope in PROMPTS if (seen := evidence.observations.get(scope)) is not None]  # fmt: skip
    largest = max((h.shift for h in far.values()), key=_nan_last)
    each = [
        make(f"raw_shift_{name.replace('.', '_')}", h.shift, "ratio", "far", n=n) for name, h in far.items()
    ]
    return [make("raw_shift", largest, "ratio", "far", n=n), *each, *scores]


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
