"""Risk from the solved update: what it does to every other key, in closed form and on banks.

At the edited layer a token with key x moves by exactly ΔW x. Moves are compared with tr(W C Wᵀ) = E‖W x‖², the
mean-square output of the unedited module, so that a share of 0.01 reads "1 % of what this module ordinarily says".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.deltas import EditDelta, LowRank, Update
from guardedit.errors import MissingStatisticsError
from guardedit.models.handle import preserved
from guardedit.records import EditRequest, LatentLeak, Score, TokenMove
from guardedit.risk.context import RiskContext, entropy_count
from guardedit.risk.key_stage import KeyView, shown_tokens, views_of
from guardedit.risk.scores import Measured, ScoreRule, measure_all

SHOWN_LATENTS = 12


@dataclass(frozen=True)
class DeltaView:
    """One delta seen through the context of its layer."""

    context: RiskContext
    views: tuple[KeyView, ...]
    delta: EditDelta

    @cached_property
    def update(self) -> Update:
        """The update; raises MissingStatisticsError for a delta of another layer, of several, or of other weights."""
        if not self.delta.touches_only_rewrite_modules:
            raise MissingStatisticsError(
                f"the delta changes {len(self.delta.changes)} parameters, not only rewrite modules: what it does to a "
                "key is not ΔW x"
            )
        if self.delta.layers != (self.context.layer,):
            raise MissingStatisticsError(
                f"the delta changes layers {self.delta.layers}, statistics are those of layer {self.context.layer}"
            )
        return self.delta.update(self.context.layer)

    @cached_property
    def leakage(self) -> float:
        """tr(ΔW C ΔWᵀ)."""
        c, update = self.context.second_moment.matrix.cpu(), self.update
        if isinstance(update, LowRank):
            left, right = update.left.double().cpu(), update.right.double().cpu()
            return float(((left.T @ left) * (right @ c @ right.T)).sum())
        matrix = update.dense().double().cpu()
        return float(((matrix @ c) * matrix).sum())

    def energy(self, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
        """‖ΔW x‖² of each key, float64."""
        return self.update.move(keys.double().cpu()).square().sum(-1)

    @cached_property
    def bank_moves(self) -> Float[Tensor, " n"]:
        """‖ΔW x‖ of each bank key, float32."""
        norms: Tensor = torch.linalg.vector_norm(self.update.move(self.context.bank.keys), dim=1)
        return norms

    def relative_moves(self, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
        """‖ΔW x‖ / ‖W x‖ of each key."""
        moved, said = self.update.move(keys), keys @ self.context.weight.T
        ratio: Tensor = torch.linalg.vector_norm(moved, dim=1) / torch.linalg.vector_norm(said, dim=1)
        return ratio

    @cached_property
    def leaks(self) -> Float[Tensor, " d_sae"]:
        """E[a_f²]·‖ΔW d_f‖² of each latent of the key-space SAE."""
        sae = self.context.need_key_sae
        return sae.energy.double().cpu() * self.energy(sae.W_dec)


def leakage(view: DeltaView) -> Measured:
    """tr(ΔW C ΔWᵀ) = E‖ΔW x‖²: mean-square move of a token of ordinary text at the edited layer.

    Squared activation, 0 upwards; for rank one ‖r‖²/(kᵀC⁻¹k). The plug-in value over the n tokens of C is too small by
    (1 − d/n)⁻². Source: DESIGN, "The mathematics in one place"; ROME eq. 2.
    """
    return Measured(view.leakage, view.context.second_moment.n_tokens)


def leakage_share(view: DeltaView) -> Measured:
    """tr(ΔW C ΔWᵀ) / tr(W C Wᵀ): the same as a share of the module's mean-square output. 0 upwards."""
    return Measured(view.leakage / view.context.output_energy, view.context.second_moment.n_tokens)


def leakage_tail(view: DeltaView) -> Measured:
    """q99 of ‖ΔW x‖ over bank tokens (which C did not see), divided by √tr(W C Wᵀ): how far the worst 1 % move.

    Share of the module's root-mean-square output, 0 upwards; damage is driven by the tail, since p(x) is heavy-tailed.
    """
    tail = float(view.bank_moves.double().quantile(0.99))
    return Measured(tail / view.context.output_energy**0.5, len(view.bank_moves))


def near_interference(view: DeltaView) -> Measured:
    """Mean ‖ΔW x_j‖² over the keys of neighbours, divided by tr(W C Wᵀ). Share, 0 upwards.

    Near damage of single edits follows it (research: Spearman 0.91 in three tidy relations, 0.55 over natural cases).
    """
    found = torch.cat([one.near_keys.float() for one in view.views])
    return _interference(view, found, "no neighbours were named or found")


def protected_interference(domain: str) -> Callable[[DeltaView], Measured]:
    """The score of one protected domain."""

    def measure(view: DeltaView) -> Measured:
        """Mean ‖ΔW x‖² over protected keys of one domain, divided by tr(W C Wᵀ). Share, 0 upwards.

        Facts about the edited subjects are left out.
        """
        without = [one.request.subject for one in view.views]
        return _interference(
            view, view.context.protected.of_domain(domain, without), f"no protected keys of {domain}"
        )

    return measure


def _interference(view: DeltaView, keys: Float[Tensor, "n d_in"], missing: str) -> Measured:
    if not len(keys):
        raise ZeroDivisionError(missing)
    share = view.energy(keys) / view.context.output_energy
    return Measured(float(share.mean()), len(keys), reason=f"largest {float(share.max()):.3g}")


def latent_leak(view: DeltaView) -> Measured:
    """Σ_f E[a_f²]·‖ΔW d_f‖²: the polysemanticity of the write; how much of which concepts' energy the edit picks up.

    Squared activation, 0 upwards, to be read beside `leakage`: cross terms and what the SAE does not see are missing.
    d_f are decoder rows of the key-space SAE. Source: DESIGN, latent leak; research/sae.md S2.
    """
    return Measured(float(view.leaks.sum()), len(view.leaks))


def latent_leak_count(view: DeltaView) -> Measured:
    """exp of the entropy of the leaks' shares: over how many latents the leak is spread.

    Latents, 1 (one concept carries it all) to d_sae. NaN, hence no value, where nothing leaks.
    """
    return Measured(float(entropy_count(view.leaks)), len(view.leaks))


def leakage_explained(view: DeltaView) -> Measured:
    """E⟨ΔW x̂, ΔW x⟩ / E‖ΔW x‖² on bank tokens, x̂ the SAE's reconstruction: share of the leakage that the SAE explains.

    Share, reported within −1 to 1 (the raw value is in the remark where it lies outside): 1 all of it, 0 none, below 0
    the SAE's picture points the other way, and then latent_leak says nothing.
    """
    keys, seen = view.context.reconstructed
    moved, explained = view.update.move(keys.double()), view.update.move(seen.double())
    raw = float((explained * moved).sum() / moved.square().sum())
    clipped = min(1.0, max(-1.0, raw)) if raw == raw else raw
    return Measured(
        clipped, len(keys), reason=None if clipped == raw or raw != raw else f"raw value {raw:.3g}"
    )


def delta_norm_ratio(view: DeltaView) -> Measured:
    """‖ΔW‖ / ‖W‖ (Frobenius), the largest over the changed parameters. Ratio, 0 upwards.

    Leads among the free scores where the size of the change varies (research: 0.75 over 80 cases). Source: PRUNE, D4S.
    """
    handle = view.context.handle
    ratios = [
        float(change.update.dense().norm() / handle.oriented(change.parameter).detach().double().norm())
        for change in view.delta.changes
    ]
    return Measured(max(ratios, default=float("nan")), len(ratios))


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


def measure_delta(context: RiskContext, requests: Sequence[EditRequest], delta: EditDelta) -> DeltaRisk:
    """Scores of a solved delta, the latents whose directions it picks up, and the tokens it would move most."""
    with preserved(context.handle):
        return delta_risk(DeltaView(context, views_of(context, requests), delta))


def delta_risk(view: DeltaView) -> DeltaRisk:
    """As `measure_delta`, for a view that is there already."""
    scores = measure_all(DELTA_SCORES, view, view.context.seed)
    value = {score.name: score.value for score in scores}
    latents = _top_latents(view) if value["latent_leak"] is not None else ()
    tokens: tuple[TokenMove, ...] = ()
    if value["leakage_tail"] is not None:
        requests = [one.request for one in view.views]
        tokens = shown_tokens(view.context, requests, view.relative_moves)
    return DeltaRisk(scores, latents, tokens)


def _top_latents(view: DeltaView) -> tuple[LatentLeak, ...]:
    sae, total = view.context.need_key_sae, float(view.leaks.sum())
    if total <= 0:
        return ()
    order = view.leaks.argsort(descending=True, stable=True)[:SHOWN_LATENTS].tolist()
    return tuple(
        LatentLeak(
            hook_name=sae.hook_name,
            latent=latent,
            leak=float(view.leaks[latent]),
            share=float(view.leaks[latent]) / total,
            label=view.context.label_of(latent)[0],
            examples=view.context.label_of(latent)[1],
            firing_rate=float(sae.firing_rate[latent]),
        )
        for latent in order
    )
