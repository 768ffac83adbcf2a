"""What the monitor would find of an edit, clean or harmful, and how it would be judged."""

from __future__ import annotations

import math
import random

from builder_parts import digest, finding, probe, score
from risk_builders import EIFFEL_LABELS, EIFFEL_PROBES, FRANCE_LABELS

from guardedit.records import DomainDrift, DriftReport, Judgement, LatentDrift

MONITORS = ("blocks.5.hook_mlp_out", "blocks.8.hook_resid_post", "blocks.20.hook_resid_post")
HARMED_PROBES = (
    *EIFFEL_PROBES[:3],
    probe("subject", "The Eiffel Tower is made of", " iron", " Rome", 0.18, 0.04, 1.7),
    probe("near", "Big Ben is located in the city of", " London", " Rome", 0.83, 0.11, 1.9),
    probe("near", "The Brandenburg Gate is located in the city of", " Berlin", " Rome", 0.74, 0.2, 1.2),
    probe("near", "The Colosseum is located in the city of", " Rome", " Rome", 0.66, 0.98, 0.4),
)


def latent_drifts(seed: int, harm: float) -> tuple[LatentDrift, ...]:
    """A volcano: most latents do not move, the target's do, and with harm others do too."""
    draw = random.Random(seed)
    rows = []
    for i in range(420):
        before = draw.betavariate(0.6, 25)
        kind = "intended" if i < 9 else ("spill" if i < 9 + 5 * harm else "collateral")
        moved = kind != "collateral" or i < 14 + 22 * harm
        shift = draw.gauss(0, 0.05 * (0.4 + harm)) if moved and i < 60 else draw.gauss(0, 0.0012)
        after = min(1.0, max(0.0, before + shift))
        effect = abs(after - before)
        p = max(1e-5, math.exp(-effect * 260) * draw.uniform(0.2, 1.0))
        rows.append(
            LatentDrift(
                hook_name=MONITORS[i % 3],
                latent=(i * 769) % 3072,
                scope="target" if kind == "intended" else ("near" if i % 2 else "far"),
                rate_before=before,
                rate_after=after,
                turnover=min(1.0, effect / (before + after + 1e-9)),
                magnitude_ratio=None if before < 0.002 else 1 + draw.gauss(0, 0.04),
                p_value=p,
                significant=p < 0.001 and effect > 0.01,
                kind=kind,  # type: ignore[arg-type]
                label=(EIFFEL_LABELS + FRANCE_LABELS)[i % 18],
            )
        )
    return tuple(rows)


def drift_of(harm: float, reference: str = "previous") -> DriftReport:
    """Post-op drift; harm 0 is a clean edit, 1 is a harmful one."""
    domains = tuple(
        DomainDrift(
            domain=name,
            scope=scope,  # type: ignore[arg-type]
            kl_nats=kl * (1 + 40 * harm),
            kl_low=kl * (1 + 40 * harm) * 0.8,
            kl_high=kl * (1 + 40 * harm) * 1.25,
            perplexity_ratio=1 + kl * (1 + 40 * harm),
            lost_top1=lost * (1 + 20 * harm),
            n_sequences=n,
            n_tokens=tokens,
        )
        for name, scope, kl, lost, n, tokens in (
            ("prose", "far", 3.1e-4, 0.0012, 24, 3072),
            ("python", "far", 1.2e-4, 0.0004, 16, 2048),
            ("chat", "far", 2.2e-4, 0.0009, 16, 2048),
            ("arithmetic", "far", 0.9e-4, 0.0, 10, 1024),
            ("near", "near", 2.9e-3, 0.006, 160, 1710),
            ("subject", "subject", 6.1e-3, 0.019, 52, 540),
        )
    )
    scores = (
        score("target_p_new", 0.979 - 0.02 * harm, "probability", "postop", "target"),
        score("paraphrase_success", 1.0, "share", "postop", "target", n=8),
        score("near_kl", 0.0029 * (1 + 40 * harm), "nats", "postop", "near", n=160, low=0.0021, high=0.2),
        score(
            "near_lost_top1", 0.006 * (1 + 20 * harm), "share", "postop", "near", n=160, low=0.001, high=0.2
        ),
        score("far_kl", 2.3e-4 * (1 + 40 * harm), "nats", "postop", "far", n=66, low=1.9e-4, high=0.02),
        score("perplexity_ratio", 1.0003 + 0.012 * harm, "ratio", "postop", "far", n=66),
        score("drifted_latents_near", 5.0 + 31 * harm, "count", "postop", "far", n=9216),
    )
    return DriftReport(
        reference=reference,  # type: ignore[arg-type]
        scores=scores,
        latents=latent_drifts(3 if reference == "previous" else 4, harm),
        domains=domains,
        probes=EIFFEL_PROBES if harm < 0.5 else HARMED_PROBES,
        integrity={
            "activations below the edited layer are bit-identical": True,
            "only the planned tensor differs from the previous version": True,
            "the staged bytes hash to what the plan recorded": True,
        },
        resolution={
            "sequences": 278,
            "tokens": 10442,
            "sequences_needed": 21,
            "smallest_rate_change": 0.00201,
            "smallest_rate_for_30_percent_loss": 0.0067,
        },
        not_measured=("Text in other languages", "Prompts longer than 128 tokens"),
        inputs={
            "far text": digest("far"),
            "near prompts": digest("near"),
            **{f"sae {hook}": digest(hook) for hook in MONITORS},
        },
        seconds=41.7,
    )


def postop_judgement(drift: DriftReport, outcome: str) -> Judgement:
    value = {s.name: s.value for s in drift.scores}
    findings = (
        finding(
            "near-answers",
            "postop/near_lost_top1",
            value["near_lost_top1"],
            0.03,
            "hard",
            "A share of {v} of the questions about other subjects has another answer now; at most {l} is allowed.",
        ),
        finding(
            "near-kl",
            "postop/near_kl",
            value["near_kl"],
            0.02,
            "soft",
            "Answers about other subjects moved by {v} nats; at most {l} is allowed.",
        ),
        finding(
            "far-kl",
            "postop/far_kl",
            value["far_kl"],
            0.005,
            "hard",
            "The worst kind of unrelated text moved by {v} nats; at most {l} is allowed.",
        ),
        finding(
            "collateral",
            "postop/drifted_latents_near",
            value["drifted_latents_near"],
            20,
            "soft",
            "{v} of the watched concepts drifted on other subjects; at most {l} are allowed.",
        ),
    )
    failed = [f for f in findings if f.verdict == "fail"]
    return Judgement(
        findings=findings,
        outcome=outcome,  # type: ignore[arg-type]
        verdict="fail" if failed else "pass",
        reason=" ".join(f.sentence for f in failed) if failed else f"All {len(findings)} limits are kept",
        policy_digest=digest("policy"),
    )
