"""Risk from the solved update: what it does to every other key, in closed form and on banks.

At an edited layer a token with key x moves by exactly ΔW x. Moves are compared with tr(W C Wᵀ) = E‖W x‖², the
mean-square output of the unedited module, so that a share of 0.01 reads "1 % of what this module ordinarily says".
Scores of a delta of several layers are sums over them, each with its own C, banks and SAE; what a layer's update does
to the keys of layers above it is left to rehearsal and monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from guardedit.edits.deltas import EditDelta, WeightChange
from guardedit.edits.updates import Change
from guardedit.errors import MissingStatisticsError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest, LatentLeak, Score, TokenMove
from guardedit.risk.context import RiskContext, entropy_count
from guardedit.risk.delta_view import DeltaView, LayerPart
from guardedit.risk.key_view import views_of
from guardedit.risk.scores import Measured, ScoreRule, measure_all
from guardedit.risk.shown import shown_tokens

SHOWN_LATENTS = 12


def leakage(view: DeltaView) -> Measured:
    """Σ_l tr(ΔW C ΔWᵀ) = E‖ΔW x‖²: mean-square move of a token of ordinary text, summed over the edited layers.

    Squared activation, 0 upwards; for rank one ‖r‖²/(kᵀC⁻¹k). The plug-in value over the n tokens of C is too small by
    (1 − d/n)⁻². Source: DESIGN, "The mathematics in one place"; ROME eq. 2.
    """
    return Measured(view.leakage, view.n_tokens)


def leakage_share(view: DeltaView) -> Measured:
    """Σ_l tr(ΔW C ΔWᵀ) / Σ_l tr(W C Wᵀ): the same as a share of the modules' mean-square output. 0 upwards."""
    return Measured(view.leakage / view.output_energy, view.n_tokens)


def leakage_tail(view: DeltaView) -> Measured:
    """q99 of √Σ_l ‖ΔW x‖² over bank tokens (which C did not see), divided by √Σ_l tr(W C Wᵀ): what the worst 1 % move.

    Share of the modules' root-mean-square output, 0 upwards; damage is driven by the tail, since p(x) is heavy-tailed.
    """
    moves = view.bank_moves
    tail = float(moves.double().quantile(0.99))
    return Measured(tail / view.output_energy**0.5, len(moves))


def near_interference(view: DeltaView) -> Measured:
    """Mean over neighbours of Σ_l ‖ΔW x_j‖², x_j their keys, divided by Σ_l tr(W C Wᵀ). Share, 0 upwards.

    Near damage of single edits follows it (research: Spearman 0.91 in three tidy relations, 0.55 over natural cases).
    """
    return _interference(view, lambda part: part.near_keys, "no neighbours were named or found")


def protected_interference(domain: str) -> Callable[[DeltaView], Measured]:
    """The score of one protected domain."""

    def measure(view: DeltaView) -> Measured:
        """Mean ‖ΔW x‖² over protected keys of one domain, divided by tr(W C Wᵀ). Share, 0 upwards.

        Facts about the edited subjects are left out.
        """
        without = [one.request.subject for one in view.views]
        return _interference(
            view,
            lambda part: part.context.protected.of_domain(domain, without),
            f"no protected keys of {domain}",
        )

    return measure


def _interference(view: DeltaView, keys: Callable[[LayerPart], torch.Tensor], missing: str) -> Measured:
    energy = view.energy(keys)
    if not len(energy):
        raise ZeroDivisionError(missing)
    share = energy / view.output_energy
    return Measured(float(share.mean()), len(share), reason=f"largest {float(share.max()):.3g}")


def latent_leak(view: DeltaView) -> Measured:
    """Σ_f E[a_f²]·‖ΔW d_f‖²: the polysemanticity of the write; how much of which concepts' energy the edit picks up.

    Squared activation, 0 upwards, to be read beside `leakage`: cross terms and what the SAE does not see are missing.
    d_f are decoder rows of the key-space SAEs; an edited layer without one is not in the sum, and the remark names it.
    Source: DESIGN, latent leak; research/sae.md S2.
    """
    leaks = view.leaks
    return Measured(float(leaks.sum()), len(leaks), reason=view.unseen)


def latent_leak_count(view: DeltaView) -> Measured:
    """exp of the entropy of the leaks' shares: over how many latents the leak is spread.

    Latents, 1 (one concept carries it all) to d_sae. NaN, hence no value, where nothing leaks.
    """
    return Measured(float(entropy_count(view.leaks)), len(view.leaks), reason=view.unseen)


def leakage_explained(view: DeltaView) -> Measured:
    """E⟨ΔW x̂, ΔW x⟩ / E‖ΔW x‖² on bank tokens, x̂ the SAE's reconstruction: share of the leakage that the SAE explains.

    Share, reported within −1 to 1 (the raw value is in the remark where it lies outside): 1 all of it, 0 none, below 0
    the SAE's picture points the other way, and then latent_leak says nothing. An edited layer without an SAE counts as
    not explained.
    """
    explained, moved, n = view.explained
    raw = explained / moved if moved else float("nan")
    clipped = min(1.0, max(-1.0, raw)) if raw == raw else raw
    remarks = [] if clipped == raw or raw != raw else [f"raw value {raw:.3g}"]
    remarks += [view.unseen] if view.unseen else []
    return Measured(clipped, n, reason="; ".join(remarks) or None)


def delta_norm_ratio(view: DeltaView) -> Measured:
    """‖ΔW‖ / ‖W‖ (Frobenius), the largest over the changed parameters. Ratio, 0 upwards.

    Of an activation edit that adds ΔW x, W is the rewrite module's weight.
    Leads among the free scores where the size of the change varies (research: 0.75 over 80 cases). Source: PRUNE, D4S.
    """
    handle = view.context.handle
    ratios = [_ratio(handle, change) for change in view.delta.changes]
    return Measured(max(ratios, default=float("nan")), len(ratios))


def _ratio(handle: ModelHandle, change: Change) -> float:
    """‖ΔW‖ / ‖W‖; of an activation edit that adds ΔW x, W is the weight it adds to."""
    if isinstance(change, WeightChange):
        norm, weight = float(change.update.dense().norm()), handle.oriented(change.parameter)
    elif change.moves:
        norm, weight = change.delta_norm, handle.weight(change.layer)
    else:
        raise MissingStatisticsError(
            f"the edit is an activation edit that pushes in layer {change.layer}: there is no weight to compare it with"
        )
    return norm / float(weight.detach().double().norm())


DELTA_SCORES: dict[str, ScoreRule[DeltaView]] = {
    "leakage": ScoreRule(leakage, "delta", "far", "squared activation"),
    "leakage_share": ScoreRule(leakage_share, "delta", "far", "share"),
    "leakage_tail": ScoreRule(leakage_tail, "delta", "far", "share"),
    "near_interference": ScoreRule(near_interference, "delta", "near", "share"),
    "protected_interference_facts": ScoreRule(protected_interference("facts"), "delta", "far", "share"),
    "protected_interference_python": ScoreRule(protected_interference("python"), "delta", "far", "share"),
    "protected_interference_prose": ScoreRule(protected_interference("prose"), "delta", "far", "share"),
    "latent_leak": ScoreRule(latent_leak, "delta", "far", "squared activation"),
    "latent_leak_count": ScoreRule(latent_leak_count, "delta", "far", "latents"),
    "leakage_explained": ScoreRule(leakage_explained, "delta", "far", "share", worst="min"),
    "delta_norm_ratio": ScoreRule(delta_norm_ratio, "delta", "model", "ratio"),
}


@dataclass(frozen=True)
class DeltaRisk:
    """The second stage's outcome."""

    scores: tuple[Score, ...]
    latents: tuple[LatentLeak, ...]
    """Latents that leak most, largest first."""
    tokens: tuple[TokenMove, ...]
    """Tokens in context with the largest ‖ΔW x‖ / ‖W x‖."""


def measure_delta(
    context: RiskContext,
    requests: Sequence[EditRequest],
    delta: EditDelta,
    others: Sequence[RiskContext] = (),
) -> DeltaRisk:
    """Scores of a solved delta, the latents whose directions it picks up, and the tokens it would move most.

    `others`: the contexts of the delta's layers beside `context`'s.
    """
    with preserved(context.handle):
        return delta_risk(DeltaView(context, views_of(context, requests), delta, tuple(others)))


def delta_risk(view: DeltaView) -> DeltaRisk:
    """As `measure_delta`, for a view that is there already."""
    scores = measure_all(DELTA_SCORES, view, view.context.seed)
    if view.is_bound:
        scores = tuple(_bounded(score) for score in scores)
    value = {score.name: score.value for score in scores}
    latents = _top_latents(view) if value["latent_leak"] is not None else ()
    tokens: tuple[TokenMove, ...] = ()
    if value["leakage_tail"] is not None and not view.is_bound:
        requests = [one.request for one in view.views]
        tokens = shown_tokens(view.parts[0].context, requests, view.relative_moves)
    return DeltaRisk(scores, latents, tokens)


def _bounded(score: Score) -> Score:
    """The score of an activation edit, with the remark that it is what its ΔW would do everywhere."""
    if score.value is None or score.name == "delta_norm_ratio":
        return score
    remark = "upper bound: as if the edit acted at every position"
    return score.model_copy(update={"reason": f"{remark}; {score.reason}" if score.reason else remark})


def _top_latents(view: DeltaView) -> tuple[LatentLeak, ...]:
    total = float(view.leaks.sum())
    if total <= 0:
        return ()
    order = view.leaks.argsort(descending=True, stable=True)[:SHOWN_LATENTS].tolist()
    places = [(part.context, latent) for part in view.seen for latent in range(len(part.leaks))]
    return tuple(_leak(places[place], float(view.leaks[place]), total) for place in order)


def _leak(place: tuple[RiskContext, int], leak: float, total: float) -> LatentLeak:
    context, latent = place
    sae = context.need_key_sae
    label, examples = context.label_of(latent)
    return LatentLeak(
        hook_name=sae.hook_name,
        latent=latent,
        leak=leak,
        share=leak / total,
        label=label,
        examples=examples,
        firing_rate=float(sae.firing_rate[latent]),
    )
