"""From an approved plan to a committed version: stage, monitor, then publish or drop. And back again.

What was approved is what is applied: nothing is solved here. The staged bytes are those whose digests the plan holds,
the monitor reads them back from disk, and one pointer switch makes them live.
"""

from __future__ import annotations

from typing import Any

from guardedit.edits.deltas import post_images, raw_bytes
from guardedit.errors import BlockedError, HeldError, NeedsApprovalError, NotFoundError, StaleError
from guardedit.gate.approvals import decide, require_approval
from guardedit.gate.policy import judge, lineage_scores
from guardedit.gate.states import advance
from guardedit.pipeline.monitoring import monitor, target_probabilities
from guardedit.pipeline.workspace import Workspace
from guardedit.records import AuditReport, Decision, DriftReport, Judgement, Plan, digest_of

_EVENTS = {"committed": "commit", "rolled-back": "roll-back", "held": "hold"}


def decide_plan(
    workspace: Workspace, plan_id: str, outcome: str, reason: str, approver: str | None = None
) -> Decision:
    """Put a person's word on record, bound to the plan's digest (and to the drift report of a held edit)."""
    plan = workspace.read_plan(plan_id)
    state = workspace.state(plan_id)
    event = "approve" if outcome == "approved" else "reject"
    held = state == "held"
    if not held:
        advance(state, event)  # type: ignore[arg-type]
    drift = _drift_digest(workspace, plan_id) if held else None
    word = decide(
        plan.digest,
        "approved" if outcome == "approved" else "rejected",
        approver or workspace.user,
        reason,
        workspace.now(),
        drift,
    )
    body: dict[str, Any] = {"plan_id": plan_id, "edit_id": plan_id, "decision": word.model_dump(mode="json")}
    workspace.ledger.append("decided", body if held else {**body, "event": event})
    return word


def apply_plan(workspace: Workspace, plan_id: str) -> AuditReport:
    """Stage, monitor and publish or drop; a committed plan is answered with its report again.

    Raises BlockedError, NeedsApprovalError, StaleError, HeldError, LockedError, IntegrityError; then what is live has
    not changed. A monitor that refuses is an outcome ("rolled-back"), not an exception.
    """
    plan = workspace.read_plan(plan_id)
    state = workspace.state(plan_id)
    if state == "committed":
        return read_report_facts(workspace, plan)
    if state == "held":
        return _settle(workspace, plan)
    _require_plan_may_go(workspace, plan)
    with workspace.store.lock():
        _stage(workspace, plan)
        return _judge_staged(workspace, plan)


def _require_plan_may_go(workspace: Workspace, plan: Plan) -> None:
    state = workspace.state(plan.plan_id)
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
    require_approval(workspace.decision(plan.plan_id), plan.digest, plan.author, policy, workspace.now())


def _require_fresh(workspace: Workspace, plan: Plan) -> None:
    """Refuse a plan whose inputs have moved on, and say what moved."""
    kit = workspace.kit
    statistics = {name: kit.digests.get(name) for name in plan.delta.statistics_digests}
    moved = [
        f"the model ({plan.model_digest} -> {workspace.handle.digest()})"
        if plan.model_digest != workspace.handle.digest()
        else "",
        "the policy" if plan.policy_digest != kit.policy.digest else "",
        *(name for name, digest in plan.delta.statistics_digests.items() if statistics[name] != digest),
    ]
    named = [what for what in moved if what]
    if named:
        workspace.ledger.append(
            "outdated", {"event": "outdate", "plan_id": plan.plan_id, "edit_id": plan.plan_id, "moved": named}
        )
        raise StaleError(f"plan {plan.plan_id} is stale: {', '.join(named)} changed since. Plan it again")


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


def _judge_staged(workspace: Workspace, plan: Plan) -> AuditReport:
    """Monitor the staged copy and do what follows from it; a crash of the monitor drops the copy."""
    try:
        before = target_probabilities(workspace.handle, plan, "before")
        with workspace.staged(plan.plan_id) as handle:
            after = target_probabilities(handle, plan, "after")
        drift, drift_base = monitor(workspace, plan)
    except BaseException:
        _drop(workspace, plan, "the monitor did not finish")
        raise
    scores = (*drift.scores, *lineage_scores((drift_base or drift).scores))
    judgement = judge(scores, workspace.kit.policy, plan.waivers, "postop", workspace.now())
    staged = workspace.store.staged(plan.plan_id).digest
    facts = _facts(workspace, plan, drift, drift_base, judgement, {**before, **after}, staged)
    if judgement.outcome == "committed":
        _commit(workspace, plan, facts)
    elif judgement.outcome == "held":
        workspace.ledger.append("held", {**facts, "event": "hold", "drift_digest": digest_of(drift)})
    else:
        _drop(workspace, plan, judgement.reason, facts)
    return read_report_facts(workspace, plan)


def _facts(
    workspace: Workspace,
    plan: Plan,
    drift: DriftReport,
    drift_base: DriftReport | None,
    judgement: Judgement,
    probabilities: dict[str, float],
    staged: str,
) -> dict[str, Any]:
    """What the ledger keeps of one monitoring: enough to write the report again from the ledger alone."""
    return {
        "plan_id": plan.plan_id,
        "edit_id": plan.plan_id,
        "plan_digest": plan.digest,
        "drift": drift.model_dump(mode="json"),
        "drift_base": drift_base.model_dump(mode="json") if drift_base else None,
        "postop": judgement.model_dump(mode="json"),
        "target_probabilities": probabilities,
        "digest_before": workspace.store.digest(),
        "digest_staged": staged,
    }


def _commit(workspace: Workspace, plan: Plan, facts: dict[str, Any]) -> None:
    # The record comes first: a crash between the two is put right by `recover`, which commits what is on record.
    workspace.ledger.append("committed", {**facts, "event": "commit"})
    workspace.store.commit(plan.plan_id)
    workspace.refresh()


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


def _settle(workspace: Workspace, plan: Plan) -> AuditReport:
    """A held edit, once somebody has decided with the drift report in hand."""
    word = workspace.decision(plan.plan_id)
    if word is not None and word.outcome == "rejected" and word.drift_digest is not None:
        with workspace.store.lock():
            _drop(
                workspace,
                plan,
                f"rejected by {word.approver}: {word.reason}",
                _last_facts(workspace, plan.plan_id),
            )
        return read_report_facts(workspace, plan)
    digest = _drift_digest(workspace, plan.plan_id)
    require_approval(word, plan.digest, plan.author, workspace.kit.policy, workspace.now(), digest)
    with workspace.store.lock():
        _commit(workspace, plan, _last_facts(workspace, plan.plan_id))
    return read_report_facts(workspace, plan)


def _drift_digest(workspace: Workspace, plan_id: str) -> str:
    held = [e for e in workspace.history(plan_id) if e.kind == "held"]
    if not held:
        raise HeldError(f"edit {plan_id} is held, but no monitor report of it is on record; roll it back")
    return str(held[-1].body["drift_digest"])


def _last_facts(workspace: Workspace, plan_id: str) -> dict[str, Any]:
    """The monitoring on record, without the event it was recorded for."""
    measured = [e for e in workspace.history(plan_id) if "postop" in e.body]
    facts = dict(measured[-1].body) if measured else {}
    for name in ("event", "drift_digest", "reason"):
        facts.pop(name, None)
    return facts


def undo(workspace: Workspace, edit_id: str, reason: str = "asked for") -> AuditReport:
    """Take a committed edit back, bit for bit, by its stored pre-images.

    Raises NotFoundError, StaleError where it is not committed, OutOfOrderError where a later edit stands on it.
    """
    plan = workspace.read_plan(edit_id)
    state = workspace.state(edit_id)
    if state not in ("committed", "held"):
        raise StaleError(f"edit {edit_id} is {state}; only a committed edit can be rolled back")
    with workspace.store.lock():
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
        digest_before=plan.model_digest,
        digest_staged=facts.get("digest_staged"),
        digest_after=live,
        created=workspace.history(plan.plan_id)[-1].at,
    )


def require_known(workspace: Workspace, edit_id: str) -> None:
    """Raise NotFoundError unless the ledger knows the edit."""
    if not workspace.history(edit_id):
        raise NotFoundError(f"no edit {edit_id!r} in {workspace.home}; `guardedit status` lists them")
