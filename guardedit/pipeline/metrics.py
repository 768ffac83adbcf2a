"""Every metric that is ever measured: what a policy may name. A rule on any other could never be checked."""

from __future__ import annotations

from collections.abc import Iterable

from guardedit.drift.probes import FAR_DOMAINS
from guardedit.pipeline.expecting import SCORES as EXPECTATIONS
from guardedit.risk.measure import SCORES

_POSTOP = (
    "target_p_new", "target_p_old", "target_p_new_before", "target_p_old_before",
    "target_success", "paraphrase_success",
    "subject_kl", "near_kl", "namesake_kl", "entailed_kl", "far_kl",
    "subject_lost_top1", "near_lost_top1", "namesake_lost_top1", "entailed_lost_top1", "far_lost_top1",
    "distractor_lost_top1", "distractor_kept_before", "distractor_kept_after", "perplexity_ratio",
    "drifted_latents_subject", "drifted_latents_near", "drifted_latents_far",
    "omnibus_subject", "omnibus_near", "omnibus_far", "energy_subject", "energy_near", "energy_far",
    "spill_mass", "sae_validity", "raw_shift", "raw_shift_subject", "raw_shift_near", "drift_percentile",
)  # fmt: skip
"""The monitor's scores, apart from those of single domains and hooks. A test compares them with a real report."""


def postop_scores(hook_names: Iterable[str]) -> frozenset[str]:
    """Names of the scores of one monitoring that watches `hook_names`."""
    domains = [f"{name}_{domain}" for name in ("far_kl", "perplexity_ratio") for domain in FAR_DOMAINS]
    hooks = [f"raw_shift_{name.replace('.', '_')}" for name in hook_names]
    return frozenset((*_POSTOP, *domains, *hooks))


def known_metrics(hook_names: Iterable[str]) -> frozenset[str]:
    """ "preop/…", "postop/…" and "postop/lineage_…": all that a policy of a model with these SAEs may limit."""
    after = postop_scores(hook_names)
    return frozenset(
        (
            *(f"preop/{name}" for name in (*SCORES, *EXPECTATIONS)),
            *(f"postop/{name}" for name in after),
            *(f"postop/lineage_{name}" for name in after),
        )
    )
