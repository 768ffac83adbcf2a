"""From observations to named scores: what each number is, its unit, and why it is missing where it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from guardedit.drift import behaviour
from guardedit.drift.behaviour import Summary
from guardedit.drift.evidence import NO_PROMPTS, NOT_FINITE, Evidence, make
from guardedit.drift.probes import DISTRACTOR, Target
from guardedit.drift.watched import latent_scores, shift_scores, validity_score
from guardedit.records import Scope, Score

_NAMED = 5
"""Requests that a remark names."""


def target_scores(evidence: Evidence) -> list[Score]:
    """Old and new target after the edited prompt, before and after; share of prompts and paraphrases that took it.

    P is the exponential of the mean token log-probability (for one token, its probability), as ROME's efficacy has it.
    Over several requests `target_p_…` are means, and the remark names the worst; `target_success` is the share of the
    requests that hold.
    """
    main = [index for index, t in enumerate(evidence.probes.targets) if not t.paraphrase]
    other = [index for index, t in enumerate(evidence.probes.targets) if t.paraphrase]
    sides = {"": evidence.after, "_before": evidence.before}
    believed = {
        f"target_p_{which}{when}": _average([getattr(side[i], f"p_{which}") for i in main])
        for when, side in sides.items()
        for which in ("new", "old")
    }
    worst = {"target_p_new": (min, "p_new"), "target_p_old": (max, "p_old")} if len(main) > 1 else {}
    remarks = {name: _worst_target(evidence, main, *how) for name, how in worst.items()}
    scores = [
        make(name, value, "probability", "target", n=len(main), reason=remarks.get(name))
        for name, value in believed.items()
    ]
    return [
        *scores,
        *(_success(*named, evidence) for named in (("target_success", main), ("paraphrase_success", other))),
    ]


def _worst_target(
    evidence: Evidence, main: Sequence[int], pick: Callable[..., int], field: str
) -> str | None:
    """A remark on the request with the lowest P(new) or the highest P(old) after the edit."""
    values = {index: getattr(evidence.after[index], field) for index in main}
    if not all(map(math.isfinite, values.values())):
        return None
    index = pick(main, key=values.__getitem__)
    return (
        f"the worst of {len(main)} requests: {values[index]:.3g} at {evidence.probes.targets[index].prompt!r}"
    )


def _success(name: str, chosen: Sequence[int], evidence: Evidence) -> Score:
    if not chosen:
        return make(name, None, "share", "target", n=0, reason="no paraphrases were given")
    believed = [evidence.after[index] for index in chosen]
    finite = all(math.isfinite(b.p_new) and math.isfinite(b.p_old) for b in believed)
    share = _average([float(b.success) for b in believed]) if finite else math.nan
    bounds = behaviour.wilson(share, len(chosen))
    reason = _failing(evidence, chosen) if finite else None
    return make(name, share, "share", "target", n=len(chosen), bounds=bounds, reason=reason)


def _failing(evidence: Evidence, chosen: Sequence[int]) -> str | None:
    """Of several requests, how many there are in which a chosen wording fails, the request with most of them first."""
    targets = evidence.probes.targets
    owners = _owners(targets)
    if len(set(owners)) < 2:
        return None
    counts = Counter(owners[index] for index in chosen if not evidence.after[index].success)
    if not counts:
        return None
    named = [f"{targets[owner].prompt!r} ({n})" for owner, n in counts.most_common(_NAMED)]
    more = f" and {len(counts) - _NAMED} more" if len(counts) > _NAMED else ""
    return f"fails in {len(counts)} of {len(set(owners))} requests: {', '.join(named)}{more}"


def _owners(targets: Sequence[Target]) -> list[int]:
    """Per wording, the index of its request's own prompt, which stands before the others."""
    owner, found = 0, []
    for index, target in enumerate(targets):
        owner = owner if target.paraphrase else index
        found.append(owner)
    return found


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def prompt_scores(evidence: Evidence) -> list[Score]:
    """KL in nats and lost top answers at the last position of subject, near, namesake and entailed prompts."""
    scores: list[Score] = []
    scopes: tuple[Scope, ...] = ("subject", "near", "namesake", "entailed")
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
