"""From observations to named scores: what each number is, its unit, and why it is missing where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from guardedit.drift import behaviour, latents
from guardedit.drift.behaviour import Summary, TargetBelief
from guardedit.drift.observe import Observation
from guardedit.drift.probes import DISTRACTOR, ProbeSet
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


def target_scores(evidence: Evidence) -> list[Score]:
    """Old and new target after the edited prompt, before and after; share of prompts and paraphrases that took it.

    P is the exponential of the mean token log-probability (for one token, its probability), as ROME's efficacy has it.
    """
    main = [index for index, t in enumerate(evidence.probes.targets) if not t.paraphrase]
    other = [index for index, t in enumerate(evidence.probes.targets) if t.paraphrase]
    sides = {"": evidence.after, "_before": evidence.before}
    believed = {
        f"target_p_{which}{when}": _average([getattr(side[i], f"p_{which}") for i in main])
        for when, side in sides.items()
        for which in ("new", "old")
    }
    scores = [make(name, value, "probability", "target", n=len(main)) for name, value in believed.items()]
    return [
        *scores,
        *(_success(*named, evidence) for named in (("target_success", main), ("paraphrase_success", other))),
    ]


def _success(name: str, chosen: Sequence[int], evidence: Evidence) -> Score:
    if not chosen:
        return make(name, None, "share", "target", n=0, reason="no paraphrases were given")
    believed = [evidence.after[index] for index in chosen]
    finite = all(math.isfinite(b.p_new) and math.isfinite(b.p_old) for b in believed)
    share = _average([float(b.success) for b in believed]) if finite else math.nan
    return make(name, share, "share", "target", n=len(chosen), bounds=behaviour.wilson(share, len(chosen)))


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def prompt_scores(evidence: Evidence) -> list[Score]:
    """KL in nats and lost top answers at the last position of subject, near and entailed prompts."""
    scores: list[Score] = []
    scopes: tuple[Scope, ...] = ("subject", "near", "entailed")
    for scope in scopes:
        summary = evidence.summary(scope)
        if summary is None:
            missing = (("kl", "nats"), ("lost_top1", "share"))
            scores += [
                make(f"{scope}_{what}", None, unit, scope, n=0, reason=NO_PROMPTS) for what, unit in missing
            ]
            continue
        n, seed = summary.n_sequences, evidence.seed
        scores.append(
            make(f"{scope}_kl", summary.kl[0], "nats", scope, n=n, bounds=summary.kl[1:], seed=seed)
        )
        lost = summary.lost if math.isfinite(summary.kl[0]) else (math.nan,) * 3
        scores.append(make(f"{scope}_lost_top1", lost[0], "share", scope, n=n, bounds=(lost[1], lost[2])))
    return scores


def distractor_scores(evidence: Evidence) -> list[Score]:
    """Near prompts with the edited sentence in front: of the answers that survive it before, the share lost after."""
    names = ("distractor_lost_top1", "distractor_kept_before", "distractor_kept_after")
    seen, near = (evidence.observations.get(name) for name in (DISTRACTOR, "near"))
    if seen is None or near is None:
        return [make(name, None, "share", "near", n=0, reason=NO_PROMPTS) for name in names]
    plain = dict(zip(near.rows.texts, near.positions.top_before.tolist(), strict=True))
    tops = torch.tensor([plain[text] for text in evidence.probes.plain_near])
    found = behaviour.distractor(tops, seen.positions)
    broken = not bool(torch.isfinite(seen.positions.kl_nats).all())
    lost = math.nan if broken else found.lost
    reason = None if found.n_kept_before else "no answer survives the edited sentence even in the reference"
    bounds = behaviour.wilson(lost, found.n_kept_before) if math.isfinite(lost) else None
    return [
        make(names[0], lost, "share", "near", n=found.n_kept_before, bounds=bounds, reason=reason),
        make(names[1], found.kept_before, "share", "near", n=found.n),
        make(names[2], math.nan if broken else found.kept_after, "share", "near", n=found.n),
    ]


def far_scores(evidence: Evidence) -> list[Score]:
    """Control text: KL and perplexity ratio by domain and their worst domain, lost top tokens over all positions."""
    domains = [s for s in evidence.domains if s.scope == "far"]
    seed = evidence.seed
    far = evidence.observations["far"]
    pooled = behaviour.summarise(far.positions, torch.ones_like(far.positions.lost), "far", "far", seed)
    scores = [_worst("far_kl", domains, lambda s: s.kl, "nats", seed)]
    scores += [make(f"far_kl_{s.domain}", s.kl[0], "nats", "far", n=s.n_sequences, bounds=s.kl[1:], seed=seed)
               for s in domains]  # fmt: skip
    lost = pooled.lost if math.isfinite(pooled.kl[0]) else (math.nan,) * 3
    scores.append(
        make("far_lost_top1", lost[0], "share", "far", n=pooled.n_sequences, bounds=lost[1:], seed=seed)
    )
    scores.append(
        _worst("perplexity_ratio", domains, lambda s: s.perplexity or (math.nan,) * 3, "ratio", seed)
    )
    for s in domains:
        low, high = (s.perplexity or (math.nan,) * 3)[1:]
        value = s.perplexity[0] if s.perplexity else None
        scores.append(make(f"perplexity_ratio_{s.domain}", value, "ratio", "far", n=s.n_sequences,
                           bounds=(low, high), seed=seed))  # fmt: skip
    return scores


def _worst(
    name: str,
    domains: Sequence[Summary],
    of: Callable[[Summary], tuple[float, float, float]],
    unit: str,
    seed: int,
) -> Score:
    """The largest value over domains, with that domain's interval; missing as soon as one domain's is."""
    if any(not math.isfinite(of(s)[0]) for s in domains):
        return make(name, None, unit, "far", reason=NOT_FINITE)
    worst = max(domains, key=lambda s: of(s)[0])
    value, low, high = of(worst)
    return make(name, value, unit, "far", n=worst.n_sequences, bounds=(low, high), seed=seed,
                reason=f"largest of {len(domains)} domains: {worst.domain}")  # fmt: skip


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


def all_scores(evidence: Evidence) -> list[Score]:
    """Every score of the monitor but `drift_percentile`, which needs the others."""
    return [
        *target_scores(evidence),
        *prompt_scores(evidence),
        *distractor_scores(evidence),
        *far_scores(evidence),
        *latent_scores(evidence),
        validity_score(evidence),
        *shift_scores(evidence),
    ]
