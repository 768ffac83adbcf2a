"""Audit reports as the pipeline would build them, with numbers of the size that the default model shows."""

from __future__ import annotations

from builder_parts import EIFFEL, FRANCE, digest, finding
from drift_builders import drift_of, postop_judgement
from plan_builders import plan_of

from guardedit.records import AuditReport, Decision, Plan, Waiver, digest_of


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
    unknown = finding(
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
