"""From an approved plan to a committed version: stage, monitor, then publish or drop. And back again.

What was approved is what is applied: nothing is solved here. The staged bytes are those whose digests the plan holds,
the monitor reads them back from disk, and one pointer switch makes them live. How each step is put on record:
`publishing`.
"""

from __future__ import annotations

from typing import Any

from guardedit.edits.deltas import post_images, raw_bytes
from guardedit.errors import IntegrityError
from guardedit.gate.policy import judge, lineage_scores
from guardedit.pipeline.beliefs import believed, outcomes, target_probabilities
from guardedit.pipeline.history import History
from guardedit.pipeline.monitoring import monitor
from guardedit.pipeline.publishing import Today, carry_out, last_facts, take_back
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.workspace import Workspace
from guardedit.records import AuditReport, DriftReport, Judgement, Plan, digest_of

UNTRACKED = "untracked"
"""Kind of the entry that says MLflow was away: about the record, not about the edit."""
OUTCOMES = {"approved": "needs-approval", "applied": "held", "monitored": "held"}
"""States that a report calls by the outcome they wait for: a copy that is staged now has no verdict yet."""


def apply_plan(workspace: Workspace, plan_id: str) -> AuditReport:
    """Stage, monitor and publish or drop; a committed plan is answered with its report again.

    Raises BlockedError, NeedsApprovalError, StaleError, HeldError, LockedError, IntegrityError; then what is live has
    not changed. A monitor that refuses is an outcome ("rolled-back"), not an exception.
    """
    plan = workspace.read_plan(plan_id)
    with editing(workspace):
        today = Today(workspace.kit.policy, workspace.kit.digests)
        carry_out(
            workspace, plan, today, lambda: _images(workspace, plan), lambda: _monitored(workspace, plan)
        )
        return read_report_facts(workspace, plan)


def _images(workspace: Workspace, plan: Plan) -> dict[str, bytes]:
    """Parameter -> bytes after the edit, from the loaded model, which must be the live one."""
    loaded, live = workspace.handle.digest(), workspace.store.digest()
    if loaded != live:
        raise IntegrityError(f"the loaded model is {loaded}, the live version is {live}")
    delta = workspace.read_delta(plan)
    workspace.progress("staging", 0.05)
    return {name: raw_bytes(image) for name, image in post_images(workspace.handle, delta).items()}


def _monitored(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """Measure and judge the staged copy, whose bytes are hashed again when that is done."""
    before = believed(workspace.handle, plan.requests)
    with workspace.staged(plan.plan_id) as handle:
        after = believed(handle, plan.requests)
    drift, drift_base = monitor(workspace, plan)
    scores = (*drift.scores, *lineage_scores((drift_base or drift).scores))
    policy, editor = workspace.kit.policy, plan.delta.editor
    judgement = judge(scores, policy, plan.waivers, "postop", workspace.now(), plan.plans, editor)
    staged = workspace.store.staged(plan.plan_id).digest
    facts = _facts(workspace, plan, drift, drift_base, judgement, staged)
    rows = [row.model_dump(mode="json") for row in outcomes(plan, before, after)]
    return {**facts, "target_probabilities": target_probabilities(before, after)} | (
        {"outcomes": rows} if rows else {}
    )


def _facts(
    workspace: Workspace,
    plan: Plan,
    drift: DriftReport,
    drift_base: DriftReport | None,
    judgement: Judgement,
    staged: str,
) -> dict[str, Any]:
    """What the ledger keeps of one monitoring: enough to write the report again from the ledger alone."""
    return {
        "plan_id": plan.plan_id,
        "edit_id": plan.plan_id,
        "plan_digest": plan.digest,
        "drift": drift.model_dump(mode="json"),
        "drift_digest": digest_of(drift),
        "drift_base": drift_base.model_dump(mode="json") if drift_base else None,
        "postop": judgement.model_dump(mode="json"),
        "digest_before": workspace.store.digest(),
        "digest_staged": staged,
    }


def undo(workspace: History, edit_id: str, reason: str = "asked for") -> AuditReport:
    """Take a committed edit back, bit for bit, by its stored pre-images; a held one is dropped.

    Raises NotFoundError, StaleError where it is not committed, OutOfOrderError where a later edit stands on it.
    """
    plan = workspace.read_plan(edit_id)
    with editing(workspace):
        take_back(workspace, plan, workspace.state(edit_id), reason)
        return read_report_facts(workspace, plan)


def read_report_facts(workspace: History, plan: Plan) -> AuditReport:
    """The audit record of a plan, put together from ledger and plan alone."""
    facts = last_facts(workspace, plan.plan_id)
    state = workspace.state(plan.plan_id)
    outcome = OUTCOMES.get(state, state)
    live = workspace.store.digest()
    return AuditReport(
        edit_id=plan.plan_id,
        plan=plan,
        plan_digest=plan.digest,
        decision=workspace.decision(plan.plan_id),
        outcome=outcome,  # type: ignore[arg-type]
        drift=DriftReport.model_validate(facts["drift"]) if facts.get("drift") else None,
        drift_base=DriftReport.model_validate(facts["drift_base"]) if facts.get("drift_base") else None,
        postop=Judgement.model_validate(facts["postop"]) if facts.get("postop") else None,
        target_probabilities=facts.get("target_probabilities", {}),
        outcomes=facts.get("outcomes", ()),
        digest_before=plan.model_digest,
        digest_staged=facts.get("digest_staged"),
        digest_after=live,
        created=[e for e in workspace.history(plan.plan_id) if e.kind != UNTRACKED][-1].at,
    )
