"""Risk from the key alone, before anything is solved.

Notation: k = k_star (d_in,), C the second moment, p(x) = kᵀC⁻¹x / kᵀC⁻¹k: a token with key x would move by p(x) times
what the subject moves by (Meng et al. 2022, eq. 2; Hu et al. 2024, "Knowledge in Superposition").
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from guardedit.models.handle import preserved
from guardedit.records import EditRequest, Score, TokenMove
from guardedit.risk.beliefs import overwritten_belief
from guardedit.risk.context import RiskContext, participation
from guardedit.risk.key_view import KeyView
from guardedit.risk.scores import Measured, ScoreRule, measure_all
from guardedit.risk.shown import shown_tokens


def key_leakage(view: KeyView) -> Measured:
    """1 / (kᵀC⁻¹k) = E[p(x)²]: mean-square share of the subject's move that a token of ordinary text makes.

    Ratio, 0 upwards; far damage of single edits follows it (research: Spearman 0.94). The plug-in value over the same
    n tokens as C is too small by (1 − d/n)⁻². Source: statistical leverage; ROME eq. 2.
    """
    return Measured(1.0 / view.leverage, view.context.need_second_moment.n_tokens)


def key_near_interference(view: KeyView) -> Measured:
    """Mean of p(x_j)² over the keys x_j of neighbours (same relation, other subject): 0 none, 1 moves like the subject.

    Ratio. Near damage follows it once multiplied by ‖r‖². Source: Hu et al. 2024 (2408.07413), p_ij.
    """
    keys = view.near_keys
    if not len(keys):
        raise ZeroDivisionError("no neighbours were named or found")
    squared = view.p(keys) ** 2
    worst = int(squared.argmax())
    return Measured(float(squared.mean()), len(keys), reason=f"largest {float(squared[worst]):.3g}")


def key_norm(view: KeyView) -> Measured:
    """‖k‖ / mean ‖x‖ over ordinary text. Ratio, 0 upwards; the trivial rival of key_leakage: long keys leak less."""
    return Measured(float(view.k.norm()) / view.context.need_second_moment.mean_norm)


def subject_position(view: KeyView) -> Measured:
    """Index of the subject's last token in the bare prompt: 0 is a land mine, as position 0's keys are like no other.

    Tokens, 0 upwards. Source: Yang et al. 2024 (2406.11263): collapse subjects are first tokens.
    """
    return Measured(
        float(view.key.position),
        reason="the subject begins at the start of the text" if view.key.subject_starts_text else None,
    )


def sae_view(view: KeyView) -> Measured:
    """‖k − k̂‖² / ‖k − μ‖²: share of the key that the SAE does not see; k̂ its reconstruction, μ the bank's mean key.

    Share, 0 upwards; above about 0.6 the SAE's words about this key mean little. The remark gives cos(k, k̂).
    """
    sae = view.context.need_key_sae
    with torch.no_grad():
        seen = sae.reconstruct(view.k.float()[None])[0].double().cpu()
    centre = view.context.bank.keys.double().mean(0)
    cosine = float(torch.cosine_similarity(view.k, seen, dim=0))
    share = float((view.k - seen).square().sum() / (view.k - centre).square().sum())
    return Measured(share, 1, reason=f"cosine of key and reconstruction {cosine:.3f}")


def neuron_polysemanticity(view: KeyView) -> Measured:
    """Σ_n ω_n·eff(n), ω_n ∝ |k_n (C⁻¹k)_n|, eff(n) = participation ratio over f of E[a_f²]·W_dec[f, n]².

    Latents per neuron, 1 to d_sae. Reported, not for gating: it hardly differs between edits. Source: research/D.3.
    """
    # A neuron that no latent writes to has no ratio; it counts as having one meaning.
    per_neuron = view.context.neuron_latents.nan_to_num(nan=1.0)
    value = float(view.neuron_weights @ per_neuron)
    below = float((per_neuron < value).double().mean())
    return Measured(
        value, len(per_neuron), reason=f"more than {100 * below:.0f} % of the layer's neurons have"
    )


def neuron_entropy_twin(view: KeyView) -> Measured:
    """Σ_n ω_n·exp H(q_n), q_n the shares of neuron n's mean-square activation over text domains: needs no SAE.

    Domains, 1 to their number. Reported, not for gating. Source: entropy-guided masks (NMKE 2025).
    """
    per_neuron = view.context.neuron_domains.nan_to_num(nan=1.0)
    return Measured(float(view.neuron_weights @ per_neuron), len(view.context.bank.keys))


def key_participation(view: KeyView) -> Measured:
    """(Σ_f a_f)² / Σ_f a_f² of the key's own latents: over how many concepts the key spreads.

    Latents, 1 upwards; 1 for a key that is one latent. Reported, not for gating. Source: participation ratio.
    """
    with torch.no_grad():
        acts = view.context.need_key_sae.encode(view.k.float()[None])[0].double().cpu()
    return Measured(float(participation(acts)), 1)


def conflict_old_nats(view: KeyView) -> Measured:
    """−log P(old target | prompt), summed over its tokens: how firmly the model holds the old fact (low = firm).

    Nats, 0 upwards. Where no old target is named, the model's own most likely next token. Source: Takahashi 2025.
    """
    if view.request.target_true is None:
        answer, logprob = view.own_answer
        return Measured(-logprob, 1, reason=f"target_true is not named; the model's own answer is {answer!r}")
    return Measured(*view.surprises[view.request.target_true])


def conflict_new_nats(view: KeyView) -> Measured:
    """−log P(new target | prompt), summed over its tokens: how far the edit has to push (high = far).

    Nats, 0 upwards. Source: priming follows the keyword's probability before learning ("How new data permeates").
    """
    return Measured(*view.surprises[view.request.target_new])


KEY_SCORES: dict[str, ScoreRule[KeyView]] = {
    "key_leakage": ScoreRule(key_leakage, "key", "far", "ratio"),
    "key_near_interference": ScoreRule(key_near_interference, "key", "near", "ratio"),
    "key_norm": ScoreRule(key_norm, "key", "far", "ratio", worst="min"),
    "subject_position": ScoreRule(subject_position, "key", "target", "tokens", worst="min"),
    "sae_view": ScoreRule(sae_view, "key", "model", "share"),
    "neuron_polysemanticity": ScoreRule(neuron_polysemanticity, "key", "far", "latents"),
    "neuron_entropy_twin": ScoreRule(neuron_entropy_twin, "key", "far", "domains"),
    "key_participation": ScoreRule(key_participation, "key", "far", "latents"),
    "conflict_old_nats": ScoreRule(conflict_old_nats, "key", "target", "nats", worst="min"),
    "conflict_new_nats": ScoreRule(conflict_new_nats, "key", "target", "nats"),
    "overwritten_belief": ScoreRule(overwritten_belief, "key", "target", "probability"),
}


def key_scores(view: KeyView, names: Collection[str]) -> tuple[Score, ...]:
    """Some of the scores, in the table's order."""
    rules = {name: rule for name, rule in KEY_SCORES.items() if name in names}
    return measure_all(rules, view, view.context.seed)


@dataclass(frozen=True)
class KeyRisk:
    """The first stage's outcome for one request."""

    scores: tuple[Score, ...]
    tokens: tuple[TokenMove, ...]
    """Tokens in context with the largest |p(x)|: `move` is the share of the subject's own move."""


def measure_key(context: RiskContext, request: EditRequest) -> KeyRisk:
    """Scores of one request from its key alone, and the tokens in context that would move most with it."""
    with preserved(context.handle):
        return key_risk(KeyView(context, request, context.sizes.near))


def key_risk(view: KeyView) -> KeyRisk:
    """As `measure_key`, for a view that is there already."""
    scores = measure_all(KEY_SCORES, view, view.context.seed)
    if scores[0].value is None:  # without a usable key_leakage, p(x) means nothing
        return KeyRisk(scores, ())
    return KeyRisk(
        scores,
        shown_tokens(view.context, (view.request,), lambda pick: view.p(pick(view.context).keys).abs()),
    )
