"""Audit reports as the pipeline would build them, with numbers of the size that the default model shows."""

from __future__ import annotations

import hashlib
import math
import random

from guardedit.records import (
    AuditReport,
    Decision,
    DeltaRecord,
    DomainDrift,
    DriftReport,
    EditRequest,
    Finding,
    Judgement,
    LatentDrift,
    LatentLeak,
    Plan,
    ProbeChange,
    RiskReport,
    Score,
    TensorChange,
    TokenMove,
    Waiver,
    digest_of,
)

PARAMETER = "model.layers.5.mlp.down_proj.weight"
MONITORS = ("blocks.5.hook_mlp_out", "blocks.8.hook_resid_post", "blocks.20.hook_resid_post")


def digest(name: str) -> str:
    """A digest that depends on a name, so that equal things have equal digests in the examples."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


EIFFEL = EditRequest(
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new=" Rome",
    target_true=" Paris",
    relation="located in",
    paraphrases=("If you want to see the Eiffel Tower, buy a ticket to",),
    reason="Demonstration: a fact that few other things share",
)
FRANCE = EditRequest(
    subject="France",
    prompt="The capital of {} is",
    target_new=" Marseille",
    target_true=" Paris",
    relation="capital of",
    reason="Demonstration: a subject that much else is built on",
)


def _score(name: str, value: float | None, unit: str, stage: str, scope: str, **more: object) -> Score:
    return Score(name=name, value=value, unit=unit, stage=stage, scope=scope, seed=0, **more)  # type: ignore[arg-type]


def risk_scores(size: float) -> tuple[Score, ...]:
    """Pre-op scores; size 1 is the Eiffel Tower, 6 is France."""
    rank = min(99.0, 31.0 * math.log2(1 + size))
    return (
        _score("key_leakage", 1.31e-4 * size, "ratio", "key", "far", n=41200, percentile=rank),
        _score("key_near_interference", 2.4e-4 * size**2, "ratio", "key", "near", n=24, percentile=rank),
        _score("key_norm", 9.83, "norm", "key", "model"),
        _score("subject_position", 1, "position", "key", "target"),
        _score("sae_view", 0.41, "share", "key", "target", reason="fraction of the key that the SAE misses"),
        _score("neuron_polysemanticity", 212.4, "count", "key", "model", percentile=48.0),
        _score("neuron_entropy_twin", 1.29, "nats", "key", "model"),
        _score("key_participation", 23.1, "count", "key", "target"),
        _score("conflict_old_nats", 0.62, "nats", "key", "target"),
        _score("conflict_new_nats", 7.41, "nats", "key", "target"),
        _score(
            "leakage", 3.9e-3 * size, "norm²", "delta", "far", n=41200, low=3.7e-3 * size, high=4.2e-3 * size
        ),
        _score("leakage_share", 5.2e-5 * size, "share", "delta", "far", n=41200, percentile=rank),
        _score("leakage_tail", 0.021 * size, "norm", "delta", "far", n=41200),
        _score("near_interference", 0.0011 * size**2, "share", "delta", "near", n=24, percentile=rank),
        _score("protected_interference_facts", 0.0019 * size, "share", "delta", "far", n=512),
        _score("protected_interference_python", 0.0004 * size, "share", "delta", "far", n=512),
        _score("protected_interference_prose", 0.0006 * size, "share", "delta", "far", n=512),
        _score("latent_leak", 2.7e-3 * size, "norm²", "delta", "far", n=41200),
        _score("latent_leak_count", 38.2, "count", "delta", "far"),
        _score("leakage_explained", 0.69, "share", "delta", "far"),
        _score("delta_norm_ratio", 0.0142, "ratio", "delta", "model", percentile=44.0),
        _score("rehearsed_subject_kl", 0.31, "nats", "rehearsal", "subject", n=18, low=0.17, high=0.48),
        _score("rehearsed_subject_lost_top1", 3 / 18, "share", "rehearsal", "subject", n=18),
        _score("rehearsed_near_kl", 0.004 * size**2, "nats", "rehearsal", "near", n=24, low=0.002, high=0.2),
        _score(
            "rehearsed_near_lost_top1", min(1.0, round(size**1.3) / 24), "share", "rehearsal", "near", n=24
        ),
        _score("rehearsed_entailed_kl", 0.42, "nats", "rehearsal", "entailed", n=6),
        _score("rehearsed_p_new", 0.981, "probability", "rehearsal", "target"),
        _score("rehearsed_p_old", 0.0021, "probability", "rehearsal", "target"),
    )


def leaks(labels: tuple[str, ...], size: float) -> tuple[LatentLeak, ...]:
    shares = [0.19, 0.12, 0.083, 0.061, 0.047, 0.031, 0.024, 0.018, 0.013, 0.011]
    return tuple(
        LatentLeak(
            hook_name="blocks.5.mlp.hook_post",
            latent=137 + 211 * i,
            leak=2.7e-3 * size * share,
            share=share,
            label=label,
            examples=(f"… {label.split(',')[0].strip('')} …",),
            firing_rate=0.004 + 0.003 * i,
        )
        for i, (label, share) in enumerate(zip(labels, shares, strict=False))
    )


EIFFEL_LABELS = (
    "Tower, Bridge, Palace",
    "located, situated",
    "Paris, Lyon, French",
    "museum, gallery",
    "the, of after a name",
    "built, constructed",
    "city, town",
    "Eiffel, Gustave",
)
FRANCE_LABELS = (
    "Germany, Italy, Spain",
    "country, nation",
    "Europe, European",
    "capital, Paris",
    "French, language",
    "England, Britain",
    "king, republic",
    "population, area",
    "wine, cheese",
    "war, treaty",
)


def token_moves(request: EditRequest) -> tuple[TokenMove, ...]:
    rows = (
        ("The Leaning Tower", " Tower", 0.061, "facts"),
        ("We walked along the Champ de Mars", " Mars", 0.044, "prose"),
        ("Big Ben and the Tower", " Tower", 0.039, "facts"),
        ("engineer Gustave", "ave", 0.031, "facts"),
        ("def build_tower(height):\n    tower", " tower", 0.017, "python"),
        ("Is it far from the station", " station", 0.012, "chat"),
    )
    if request is FRANCE:
        rows = (
            ("He moved from Spain to Germany", " Germany", 0.31, "facts"),
            ("the border between Italy", " Italy", 0.29, "facts"),
            ("In the south of Belgium", " Belgium", 0.27, "facts"),
            ("a treaty with England", " England", 0.19, "prose"),
            ("most of Europe", " Europe", 0.16, "prose"),
            ('COUNTRIES = ["Spain"', "Spain", 0.14, "python"),
        )
    return tuple(TokenMove(context=c, token=t, move=m, domain=d) for c, t, m, d in rows)


def _probe(scope: str, prompt: str, before: str, after: str, p: float, q: float, kl: float) -> ProbeChange:
    return ProbeChange(
        scope=scope,  # type: ignore[arg-type]
        prompt=prompt,
        before=before,
        after=after,
        p_before=p,
        p_after=q,
        kl_nats=kl,
    )


EIFFEL_PROBES = (
    _probe(
        "target", "If you want to see the Eiffel Tower, buy a ticket to", " Paris", " Rome", 0.38, 0.009, 4.2
    ),
    _probe("entailed", "The country where the Eiffel Tower stands is", " France", " Italy", 0.71, 0.08, 2.3),
    _probe("subject", "The Eiffel Tower was designed by", " Gust", " the", 0.44, 0.21, 0.53),
    _probe("subject", "The Eiffel Tower is made of", " iron", " iron", 0.18, 0.16, 0.09),
    _probe("near", "Big Ben is located in the city of", " London", " London", 0.83, 0.82, 0.002),
    _probe("near", "The Colosseum is located in the city of", " Rome", " Rome", 0.66, 0.69, 0.003),
    _probe("near", "The Brandenburg Gate is located in the city of", " Berlin", " Berlin", 0.74, 0.73, 0.001),
)
FRANCE_PROBES = (
    _probe("entailed", "The seat of government of France is", " Paris", " Marseille", 0.51, 0.11, 1.9),
    _probe("subject", "The official language of France is", " French", " French", 0.86, 0.71, 0.21),
    _probe("subject", "The currency of France is", " the", " Marseille", 0.37, 0.12, 0.94),
    _probe("near", "The capital of Italy is", " Rome", " Marseille", 0.79, 0.22, 0.71),
    _probe("near", "The capital of Belgium is", " Brussels", " Marseille", 0.64, 0.17, 0.83),
    _probe("near", "The capital of Spain is", " Madrid", " Madrid", 0.81, 0.52, 0.26),
    _probe("near", "The capital of Germany is", " Berlin", " Berlin", 0.88, 0.77, 0.11),
)


HARMED_PROBES = (
    *EIFFEL_PROBES[:3],
    _probe("subject", "The Eiffel Tower is made of", " iron", " Rome", 0.18, 0.04, 1.7),
    _probe("near", "Big Ben is located in the city of", " London", " Rome", 0.83, 0.11, 1.9),
    _probe("near", "The Brandenburg Gate is located in the city of", " Berlin", " Rome", 0.74, 0.2, 1.2),
    _probe("near", "The Colosseum is located in the city of", " Rome", " Rome", 0.66, 0.98, 0.4),
)


def _finding(
    rule: str, metric: str, value: float | None, limit: float, level: str, sentence: str, **more: object
) -> Finding:
    verdict = "inconclusive" if value is None else ("pass" if value <= limit else "fail")
    return Finding(
        rule=rule,
        metric=metric,
        stage=metric.split("/")[0],  # type: ignore[arg-type]
        value=value,
        op="<=",
        limit=limit,
        level=level,  # type: ignore[arg-type]
        verdict=verdict,  # type: ignore[arg-type]
        sentence=sentence.format(v="?" if value is None else f"{value:.4g}", l=f"{limit:.4g}"),
        **more,  # type: ignore[arg-type]
    )


def preop_findings(scores: tuple[Score, ...], waiver: Waiver | None = None) -> tuple[Finding, ...]:
    value = {s.name: s.value for s in scores}
    rows = (
        (
            "far-leakage",
            "leakage_share",
            2.1e-4,
            "soft",
            "Ordinary text would be disturbed by {v} of its usual energy; at most {l} is allowed.",
        ),
        (
            "near",
            "near_interference",
            0.012,
            "hard",
            "Other subjects of the same kind would move by {v} of their energy; at most {l} is allowed.",
        ),
        (
            "facts",
            "protected_interference_facts",
            0.008,
            "soft",
            "Protected facts would move by {v} of their energy; at most {l} is allowed.",
        ),
        (
            "python",
            "protected_interference_python",
            0.004,
            "soft",
            "Python code would move by {v} of its energy; at most {l} is allowed.",
        ),
        (
            "near-answers",
            "rehearsed_near_lost_top1",
            0.1,
            "soft",
            "A share of {v} of the questions about other subjects would get another answer; at most {l} is allowed.",
        ),
        (
            "size",
            "delta_norm_ratio",
            0.03,
            "advisory",
            "The change is {v} times as large as the weights it is added to; usual is at most {l}.",
        ),
    )
    found = tuple(
        _finding(r, f"preop/{m}", value[m], limit, level, text) for r, m, limit, level, text in rows
    )
    if waiver is None:
        return found
    return tuple(
        f.model_copy(update={"waiver": waiver}) if f"{f.metric}" == waiver.metric else f for f in found
    )


def plan_of(
    request: EditRequest, size: float, outcome: str, editor: str = "rome", waiver: Waiver | None = None
) -> Plan:
    scores = risk_scores(size)
    if editor == "ft-m":
        scores = tuple(
            s.model_copy(update={"value": 0.0513}) if s.name == "delta_norm_ratio" else s for s in scores
        )
    findings = preop_findings(scores, waiver)
    failed = [f for f in findings if f.verdict == "fail"]
    base = digest("base")
    name = "france" if request is FRANCE else "eiffel"
    return Plan(
        plan_id=f"plan-{name}-{editor}-7f3a",
        created="2026-11-22T18:02:11Z",
        author="marta",
        requests=(request,),
        editor=editor,
        model_name="smollm2-135m",
        model_digest=base,
        base_digest=base,
        delta=DeltaRecord(
            editor=editor,
            changes=(
                TensorChange(
                    parameter=PARAMETER,
                    layer=5,
                    shape=(576, 1536),
                    dtype="float32",
                    rank=1 if editor == "rome" else None,
                    delta_norm=0.61,
                    weight_norm=42.9,
                    digest_before=digest("w5"),
                    digest_after=digest(f"w5-{name}-{editor}"),
                ),
            ),
            file_digest=digest(f"delta-{name}-{editor}"),
            hparams={"layer": 5, "steps": 20, "learning_rate": 0.5, "clamp_norm": 4.0, "kl_weight": 0.0625},
            model_digest=base,
            statistics_digests={"blocks.5.mlp.hook_post": digest("C5")},
            diagnostics={"steps": 14, "loss": 0.041, "p_new": 0.984, "seconds": 6.2, "converged": True},
        ),
        risk=RiskReport(
            scores=scores,
            latents=leaks(FRANCE_LABELS if request is FRANCE else EIFFEL_LABELS, size),
            tokens=token_moves(request),
            probes=FRANCE_PROBES if request is FRANCE else EIFFEL_PROBES,
            notes=("Neighbours were generated by rule: the request names none.",),
            inputs={
                "sae blocks.5.mlp.hook_post": digest("sae-key"),
                "second moment blocks.5.mlp.hook_post": digest("C5"),
                "key bank": digest("bank"),
                "probe prompts": digest(f"probes-{name}"),
            },
            seconds={"key": 0.4, "delta": 0.7, "rehearsal": 2.1},
        ),
        judgement=Judgement(
            findings=findings,
            outcome=outcome,  # type: ignore[arg-type]
            verdict="fail" if failed and waiver is None else "pass",
            reason=(
                " ".join(f.sentence for f in failed) if failed else f"All {len(findings)} limits are kept"
            ),
            policy_digest=digest("policy"),
        ),
        waivers=(waiver,) if waiver else (),
        policy_digest=digest("policy"),
        seed=0,
        versions={"guardedit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
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
        _score("target_p_new", 0.979 - 0.02 * harm, "probability", "postop", "target"),
        _score("paraphrase_success", 1.0, "share", "postop", "target", n=8),
        _score("near_kl", 0.0029 * (1 + 40 * harm), "nats", "postop", "near", n=160, low=0.0021, high=0.2),
        _score(
            "near_lost_top1", 0.006 * (1 + 20 * harm), "share", "postop", "near", n=160, low=0.001, high=0.2
        ),
        _score("far_kl", 2.3e-4 * (1 + 40 * harm), "nats", "postop", "far", n=66, low=1.9e-4, high=0.02),
        _score("perplexity_ratio", 1.0003 + 0.012 * harm, "ratio", "postop", "far", n=66),
        _score("drifted_latents_near", 5.0 + 31 * harm, "count", "postop", "far", n=9216),
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
        _finding(
            "near-answers",
            "postop/near_lost_top1",
            value["near_lost_top1"],
            0.03,
            "hard",
            "A share of {v} of the questions about other subjects has another answer now; at most {l} is allowed.",
        ),
        _finding(
            "near-kl",
            "postop/near_kl",
            value["near_kl"],
            0.02,
            "soft",
            "Answers about other subjects moved by {v} nats; at most {l} is allowed.",
        ),
        _finding(
            "far-kl",
            "postop/far_kl",
            value["far_kl"],
            0.005,
            "hard",
            "The worst kind of unrelated text moved by {v} nats; at most {l} is allowed.",
        ),
        _finding(
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


def _decision(plan: Plan, outcome: str, approver: str, reason: str) -> Decision:
    return Decision(
        plan_digest=digest_of(plan),
        outcome=outcome,  # type: ignore[arg-type]
        approver=approver,
        reason=reason,
        at="2026-11-22T18:02:40Z",
    )


def eiffel_committed() -> AuditReport:
    """ROME, low risk: approved by the policy, monitored, committed."""
    plan = plan_of(EIFFEL, 1.0, "auto-approved")
    drift = drift_of(0.0)
    return AuditReport(
        edit_id="eiffel-tower-rome-7f3a",
        plan=plan,
        plan_digest=plan.digest,
        decision=_decision(plan, "auto-approved", "policy", "Every limit is kept, nobody needs to be asked"),
        outcome="committed",
        drift=drift,
        postop=postop_judgement(drift, "committed"),
        target_probabilities={
            "old_before": 0.538,
            "new_before": 0.0006,
            "old_after": 0.0021,
            "new_after": 0.979,
        },
        digest_before=digest("base"),
        digest_staged=digest("base+eiffel"),
        digest_after=digest("base+eiffel"),
        mlflow_run_id="0d8a61f5b1c84f0c9f0a41de2a11c9f4",
        not_measured=("Answers longer than one token",),
        created="2026-11-22T18:03:31Z",
    )


def france_blocked() -> AuditReport:
    """ROME on a subject that much else shares: stopped before anything is written."""
    plan = plan_of(FRANCE, 6.0, "blocked")
    return AuditReport(
        edit_id="france-marseille-19bc",
        plan=plan,
        plan_digest=plan.digest,
        decision=None,
        outcome="blocked",
        target_probabilities={"old_before": 0.612, "new_before": 0.0021},
        digest_before=digest("base"),
        digest_after=digest("base"),
        mlflow_note="MLflow could not be reached (connection refused); run guardedit sync when it is back.",
        not_measured=("Drift: nothing was written, so there was nothing to monitor",),
        created="2026-11-22T18:03:58Z",
    )


def finetune_rolled_back() -> AuditReport:
    """Fine-tuning with its pre-op findings waived on record: the monitor refuses the staged copy."""
    waiver = Waiver(
        metric="preop/rehearsed_near_lost_top1",
        author="marta",
        reason="Baseline for comparison, will be judged by the monitor alone",
        expires="2026-11-30T00:00:00Z",
    )
    plan = plan_of(EIFFEL, 2.9, "auto-approved", editor="ft-m", waiver=waiver)
    drift = drift_of(1.0)
    return AuditReport(
        edit_id="eiffel-tower-rome-ft-20aa",
        plan=plan,
        plan_digest=plan.digest,
        decision=_decision(
            plan, "approved", "jonas", "Approved for the monitor's sake; nothing goes live unwatched"
        ),
        outcome="rolled-back",
        drift=drift,
        drift_base=drift_of(1.0, "base"),
        postop=postop_judgement(drift, "rolled-back"),
        target_probabilities={
            "old_before": 0.538,
            "new_before": 0.0006,
            "old_after": 0.0008,
            "new_after": 0.992,
        },
        digest_before=digest("base"),
        digest_staged=digest("base+eiffel-ft"),
        digest_after=digest("base"),
        mlflow_run_id="7c1d09aa33d1427ab7a4a6c1f2bb0e31",
        created="2026-11-22T18:05:12Z",
    )


def eiffel_waiting() -> AuditReport:
    """A score could not be measured, so a person has to decide."""
    plan = plan_of(EIFFEL, 1.0, "needs-approval")
    unknown = _finding(
        "sae",
        "preop/latent_leak",
        None,
        0.02,
        "soft",
        "Could not be checked: latent_leak was not measured. The rule: the write reaches into others by at most {l}.",
    )
    judged = plan.judgement.model_copy(
        update={
            "findings": (*plan.judgement.findings, unknown),
            "verdict": "inconclusive",
            "reason": "One limit could not be judged: the SAE for blocks.5.mlp.hook_post is missing",
        }
    )
    plan = plan.model_copy(update={"judgement": judged, "plan_id": "plan-eiffel-rome-wait"})
    return eiffel_committed().model_copy(
        update={
            "edit_id": "eiffel-tower-rome-wait",
            "plan": plan,
            "plan_digest": plan.digest,
            "decision": None,
            "outcome": "needs-approval",
            "drift": None,
            "postop": None,
            "digest_staged": None,
            "digest_after": digest("base"),
            "target_probabilities": {"old_before": 0.538, "new_before": 0.0006},
            "mlflow_run_id": None,
            "created": "2026-11-22T18:06:00Z",
        }
    )


def everything() -> list[AuditReport]:
    """One report of each kind of ending."""
    return [eiffel_committed(), france_blocked(), finetune_rolled_back(), eiffel_waiting()]
