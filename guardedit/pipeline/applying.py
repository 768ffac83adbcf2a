"""From an approved plan to a committed version: stage, monitor, then publish or drop. And back again.

What was approved is what is applied: nothing is solved here. The staged bytes are those whose digests the plan holds,
the monitor reads them back from disk, and one pointer switch makes them live.
"""

from __future__ import annotations

from typing import Any

from guardedit.edits.deltas import post_images, raw_bytes
from guardedit.errors import (
    BlockedError,
    GuardeditError,
    IntegrityError,
    NeedsApprovalError,
    StaleError,
)
from guardedit.gate.approvals import waiver_problem
from guardedit.gate.policy import judge, lineage_scores
from guardedit.gate.states import State, advance
from guardedit.pipeline.anchoring import after_commit
from guardedit.pipeline.beliefs import believed, outcomes, target_probabilities
from guardedit.pipeline.clock import require_clock
from guardedit.pipeline.deciding import drift_digest_of, require_approved
from guardedit.pipeline.monitoring import monitor
from guardedit.pipeline.policies import require_policy
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.workspace import Workspace
from guardedit.records import AuditReport, DriftReport, Judgement, Plan, digest_of

UNTRACKED = "untracked"
"""Kind of the entry that says MLflow was away: about the record, not about the edit."""


def apply_plan(workspace: Workspace, plan_id: str) -> AuditReport:
    """Stage, monitor and publish or drop; a committed plan is answered with its report again.

    Raises BlockedError, NeedsApprovalError, StaleError, HeldError, LockedError, IntegrityError; then what is live has
    not changed. A monitor that refuses is an outcome ("rolled-back"), not an exception.
    """
    plan = workspace.read_plan(plan_id)
    with editing(workspace):
        state = workspace.state(plan_id)
        if state == "held":
            _settle(workspace, plan)
        elif state != "committed":
            _require_plan_may_go(workspace, plan, state)
            _stage(workspace, plan)
            _judge_staged(workspace, plan)
        return read_report_facts(workspace, plan)


def _require_plan_may_go(workspace: Workspace, plan: Plan, state: State) -> None:
    if state in ("blocked", "rejected"):
        raise BlockedError(f"plan {plan.plan_id} is {state}: {plan.judgement.reason}")
    if state == "needs-approval":
        raise NeedsApprovalError(
            f"plan {plan.plan_id} waits for a person: {plan.judgement.reason} "
            f'Decide with `guardedit approve {plan.plan_id} --reason "..."` or `guardedit reject`'
        )
    advance(state, "stage")
    _require_fresh(workspace, plan)
    policy = workspace.kit.policy
    require_clock(workspace)
    require_policy(workspace, policy)
    if state == "auto-approved":
        _require_waivers_stand(workspace, plan)
    require_approved(workspace, plan, policy)


def _require_waivers_stand(workspace: Workspace, plan: Plan) -> None:
    """A plan that only waivers let through needs them when it is applied, too."""
    for finding in plan.judgement.findings:
        problem = waiver_problem(finding.waiver, workspace.now()) if finding.waiver else None
        if problem is not None:
            raise StaleError(
                f"plan {plan.plan_id} rests on a waiver of {finding.metric}, and {problem}; plan again with a new one"
            )


def _require_fresh(workspace: Workspace, plan: Plan) -> None:
    """Refuse a plan whose inputs have moved on, and say what moved."""
    kit, live = workspace.kit, workspace.store.digest()
    named = [f"the model ({plan.model_digest} -> {live})"] if plan.model_digest != live else []
    named += ["the policy"] if plan.policy_digest != kit.policy.digest else []
    used = plan.delta.statistics_digests
    named += [name for name, digest in used.items() if kit.digests.get(name) != digest]
    if named:
        workspace.ledger.append(
            "outdated", {"event": "outdate", "plan_id": plan.plan_id, "edit_id": plan.plan_id, "moved": named}
        )
        raise StaleError(f"plan {plan.plan_id} is stale: {', '.join(named)} changed since. Plan it again")
    if workspace.handle.digest() != live:
        raise IntegrityError(f"the loaded model is {workspace.handle.digest()}, the live version is {live}")


def _stage(workspace: Workspace, plan: Plan) -> None:
    delta = workspace.read_delta(plan)
    images = {name: raw_bytes(image) for name, image in post_images(workspace.handle, delta).items()}
    expected = {change.parameter: change.digest_after for change in plan.delta.changes}
    workspace.progress("staging", 0.05)
    staged = workspace.store.stage(plan.plan_id, images, expected=expected, plan_digest=plan.digest)
    workspace.ledger.append(
        "staged",
        {"event": "stage", "plan_id": plan.plan_id, "edit_id": plan.plan_id, "digest_staged": staged.digest},
    )


def _judge_staged(workspace: Workspace, plan: Plan) -> None:
    """Monitor the staged copy and do what follows from it; a monitor that does not finish drops the copy."""
    try:
        facts = _monitored(workspace, plan)
    except BaseException as error:
        _drop(workspace, plan, f"the monitor did not finish: {type(error).__name__}: {error}"[:500])
        raise
    outcome = facts["postop"]["outcome"]
    if outcome == "committed":
        _commit(workspace, plan, facts)
    elif outcome == "held":
        workspace.ledger.append("held", {**facts, "event": "hold"})
    else:
        _drop(workspace, plan, facts["postop"]["reason"], facts)


def _monitored(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """Measure and judge the staged copy, whose bytes are hashed again when that is done."""
    before = believed(workspace.handle, plan.requests)
    with workspace.staged(plan.plan_id) as handle:
        after = believed(handle, plan.requests)
    drift, drift_base = monitor(workspace, plan)
    scores = (*drift.scores, *lineage_scores((drift_base or drift).scores))
    judgement = judge(scores, workspace.kit.policy, plan.waivers, "postop", workspace.now(), plan.plans)
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


def _commit(workspace: Workspace, plan: Plan, facts: dict[str, Any]) -> None:
    # A staged copy that is broken or stands on another version stops a commit before it is on record.
    workspace.store.staged(plan.plan_id)
    # The record comes first: a crash between the two is put right by `recover`, which commits what is on record.
    workspace.ledger.append("committed", {**facts, "event": "commit"})
    try:
        workspace.store.commit(plan.plan_id)
    except GuardeditError as error:
        if workspace.store.lineage().edit(plan.plan_id) is None:
            _drop(workspace, plan, f"the commit failed: {error}"[:500])
        raise
    workspace.refresh()
    after_commit(workspace)


def _drop(workspace: Workspace, plan: Plan, reason: str, facts: dict[str, Any] | None = None) -> None:
    body = {
        "plan_id": plan.plan_id,
        "edit_id": plan.plan_id,
        **(facts or {}),
        "event": "roll-back",
        "reason": reason,
    }
    workspace.ledger.append("rolled-back", body)
    workspace.store.drop_staged(plan.plan_id)


def _settle(workspace: Workspace, plan: Plan) -> None:
    """A held edit, once somebody has decided with the drift report in hand."""
    word = workspace.decision(plan.plan_id)
    facts = _last_facts(workspace, plan.plan_id)
    if word is not None and word.outcome == "rejected" and word.drift_digest is not None:
        _drop(workspace, plan, f"rejected by {word.approver}: {word.reason}", facts)
        return
    require_clock(workspace)
    _require_same_policy(workspace, plan)
    require_policy(workspace, workspace.kit.policy)
    require_approved(workspace, plan, workspace.kit.policy, drift_digest_of(workspace, plan.plan_id))
    try:
        _commit(workspace, plan, facts)
    except StaleError as error:
        _drop(workspace, plan, str(error), facts)
        raise


def _require_same_policy(workspace: Workspace, plan: Plan) -> None:
    """A held edit waits for what its own policy asks; another file, with fewer demands, does not let it go ahead."""
    if plan.policy_digest != workspace.kit.policy.digest:
        raise StaleError(
            f"edit {plan.plan_id} was judged by policy {plan.policy_digest}, this one is "
            f"{workspace.kit.policy.digest}; name its own with --policy, or roll it back and plan again"
        )


def _last_facts(workspace: Workspace, plan_id: str) -> dict[str, Any]:
    """The monitoring on record, without the event it was recorded for."""
    measured = [e for e in workspace.history(plan_id) if "postop" in e.body]
    facts = dict(measured[-1].body) if measured else {}
    for name in ("event", "reason"):
        facts.pop(name, None)
    return facts


def undo(workspace: Workspace, edit_id: str, reason: str = "asked for") -> AuditReport:
    """Take a committed edit back, bit for bit, by its stored pre-images.

    Raises NotFoundError, StaleError where it is not committed, OutOfOrderError where a later edit stands on it.
    """
    plan = workspace.read_plan(edit_id)
    with editing(workspace):
        state = workspace.state(edit_id)
        if state not in ("committed", "held"):
            raise StaleError(f"edit {edit_id} is {state}; only a committed or held edit can be rolled back")
        if state == "held":
            _drop(workspace, plan, reason, _last_facts(workspace, edit_id))
        else:
            _undo_committed(workspace, plan, reason)
        return read_report_facts(workspace, plan)


def _undo_committed(workspace: Workspace, plan: Plan, reason: str) -> None:
    before = workspace.store.digest()
    record = workspace.store.roll_back(plan.plan_id)
    workspace.ledger.append(
        "rolled-back",
        {
            "event": "roll-back",
            "plan_id": plan.plan_id,
            "edit_id": plan.plan_id,
            "reason": reason,
            "undone": True,
            "digest_before_undo": before,
            "digest_after": record.digest,
            "by": workspace.user,
        },
    )
    workspace.refresh()


def read_report_facts(workspace: Workspace, plan: Plan) -> AuditReport:
    """The audit record of a plan, put together from ledger and plan alone."""
    facts = _last_facts(workspace, plan.plan_id)
    state = workspace.state(plan.plan_id)
    # An approved plan still waits to be applied; a copy that is staged now has no verdict yet.
    outcome = {"approved": "needs-approval", "staged": "held"}.get(state, state)
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
