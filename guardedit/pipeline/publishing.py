"""The steps from a yes to what is live and back, as they are put on record: each entry before its effect. No torch.

What is measured in between, and the bytes of the edit, come from `applying`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guardedit.audit.lineage import VersionRecord
from guardedit.errors import BlockedError, GuardeditError, NeedsApprovalError, StaleError
from guardedit.gate.approvals import waiver_problem
from guardedit.gate.rules import Policy
from guardedit.gate.states import State, advance
from guardedit.pipeline.anchoring import after_commit
from guardedit.pipeline.clock import require_clock
from guardedit.pipeline.deciding import drift_digest_of, require_approved
from guardedit.pipeline.history import History
from guardedit.pipeline.outdating import aged, moved_on, moved_since, outdate, record_outdated
from guardedit.pipeline.owning import require_policy
from guardedit.records import Plan


@dataclass(frozen=True)
class Today:
    """What a plan is held against when it is applied."""

    policy: Policy
    inputs: Mapping[str, str]
    """Name -> digest of statistics, SAEs and maps."""


def carry_out(
    workspace: History,
    plan: Plan,
    today: Today,
    images: Callable[[], Mapping[str, bytes]],
    measure: Callable[[], Mapping[str, Any]],
) -> None:
    """The order of an apply, the caller holding the lock: everything that can refuse, the staged copy, the monitor, and
    what follows from its verdict. Nothing for a committed plan; a held one is settled by the word on it.

    `images` gives the edited bytes, `measure` the monitor's facts; where it does not finish, the copy is dropped.
    """
    state = workspace.state(plan.plan_id)
    if state == "held":
        settle_held(workspace, plan, today.policy)
    elif state != "committed":
        require_open(workspace, plan, state)
        require_unmoved(workspace, plan, today.inputs, today.policy)
        require_clock(workspace)
        require_policy(workspace, today.policy)
        require_yes(workspace, plan, state, today.policy)
        stage(workspace, plan, images())
        try:
            facts = measure()
        except BaseException as error:
            drop(workspace, plan, f"the monitor did not finish: {type(error).__name__}: {error}"[:500])
            raise
        settle_monitored(workspace, plan, facts)


def require_open(workspace: History, plan: Plan, state: State) -> None:
    """Refuse a plan whose state cannot lead to a staged copy; raises the error of that state, with what to do next."""
    plan_id = plan.plan_id
    if state in ("blocked", "rejected"):
        raise BlockedError(f"plan {plan_id} is {state}: {plan.judgement.reason}")
    if state == "needs-approval":
        raise NeedsApprovalError(
            f"plan {plan_id} waits for a person: {plan.judgement.reason} "
            f'Decide with `guardedit approve {plan_id} --reason "..."` or `guardedit reject`'
        )
    if state in ("stale", "expired"):
        why = ", ".join(moved_on(workspace, plan_id))
        raise StaleError(f"plan {plan_id} is {state}: {why}. Plan it again with `guardedit replan {plan_id}`")
    advance(state, "stage")


def require_unmoved(workspace: History, plan: Plan, inputs: Mapping[str, str], policy: Policy) -> None:
    """Put on record and refuse that the model, the policy, an SAE or a statistic is another than when it was planned.

    `inputs`: name -> digest of what there is today.
    """
    named = moved_since(plan, workspace.store.digest(), policy.digest, inputs)
    if named:
        record_outdated(workspace, plan.plan_id, named)
        raise StaleError(
            f"plan {plan.plan_id} is stale: {', '.join(named)} changed since. "
            f"Plan it again with `guardedit replan {plan.plan_id}`"
        )


def require_yes(workspace: History, plan: Plan, state: State, policy: Policy) -> None:
    """The words and waivers that the plan rests on count today; raises as `require_approved` does."""
    if state == "auto-approved":
        _require_waivers_stand(workspace, plan)
    if aged(workspace, plan, state, policy) == "expired":
        raise StaleError(
            f"plan {plan.plan_id} has expired: {', '.join(moved_on(workspace, plan.plan_id))}. "
            f"Plan it again with `guardedit replan {plan.plan_id}`"
        )
    require_approved(workspace, plan, policy)


def _require_waivers_stand(workspace: History, plan: Plan) -> None:
    """A plan that only waivers let through needs them when it is applied, too."""
    for finding in plan.judgement.findings:
        problem = waiver_problem(finding.waiver, workspace.now()) if finding.waiver else None
        if problem is not None:
            raise StaleError(
                f"plan {plan.plan_id} rests on a waiver of {finding.metric}, and {problem}; plan again with a new one"
            )


def stage(workspace: History, plan: Plan, images: Mapping[str, bytes]) -> str:
    """Write the edited copy beside the live model and put that on record; returns the copy's digest.

    images: parameter -> raw bytes, each of which must hash to what the plan names. A copy that is not on record does
    not exist for anybody: recovery deletes it.
    """
    expected = {change.parameter: change.digest_after for change in plan.delta.changes}
    staged = workspace.store.stage(plan.plan_id, images, expected=expected, plan_digest=plan.digest)
    _tell(workspace, "staged", plan, {"event": "stage", "digest_staged": staged.digest})
    return staged.digest


def settle_monitored(workspace: History, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Put the monitor's verdict on record, then do what follows from it: commit, hold, or drop the copy.

    `facts` are the monitor's: `postop` (a judgement), `drift_digest`, `digest_staged` and more for the report.
    """
    judged = facts["postop"]
    short = {name: facts[name] for name in ("drift_digest", "digest_staged")}
    _tell(workspace, "monitored", plan, {"event": "monitor", "verdict": judged["verdict"], **short})
    if judged["outcome"] == "committed":
        commit(workspace, plan, facts)
    elif judged["outcome"] == "held":
        _tell(workspace, "held", plan, {**facts, "event": "hold"})
    else:
        drop(workspace, plan, judged["reason"], facts)


def commit(workspace: History, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Publish the staged copy; plans that were made on the version before are stale from then on."""
    # A staged copy that is broken or stands on another version stops a commit before it is on record.
    workspace.store.staged(plan.plan_id)
    # The record comes first: a crash between the two is put right by `recover`, which commits what is on record.
    _tell(workspace, "committed", plan, {**facts, "event": "commit"})
    try:
        workspace.store.commit(plan.plan_id)
    except GuardeditError as error:
        if workspace.store.lineage().edit(plan.plan_id) is None:
            drop(workspace, plan, f"the commit failed: {error}"[:500])
        raise
    outdate(workspace)
    workspace.refresh()
    after_commit(workspace)


def drop(workspace: History, plan: Plan, reason: str, facts: Mapping[str, Any] | None = None) -> None:
    """Give a staged copy up."""
    _tell(workspace, "rolled-back", plan, {**(facts or {}), "event": "roll-back", "reason": reason})
    workspace.store.drop_staged(plan.plan_id)


def settle_held(workspace: History, plan: Plan, policy: Policy) -> None:
    """A held edit, once somebody has decided with the drift report in hand."""
    word = workspace.decision(plan.plan_id)
    facts = last_facts(workspace, plan.plan_id)
    if word is not None and word.outcome == "rejected" and word.drift_digest is not None:
        drop(workspace, plan, f"rejected by {word.approver}: {word.reason}", facts)
        return
    require_clock(workspace)
    _require_same_policy(plan, policy)
    require_policy(workspace, policy)
    require_approved(workspace, plan, policy, drift_digest_of(workspace, plan.plan_id))
    try:
        commit(workspace, plan, facts)
    except StaleError as error:
        drop(workspace, plan, str(error), facts)
        raise


def _require_same_policy(plan: Plan, policy: Policy) -> None:
    """A held edit waits for what its own policy asks; another file, with fewer demands, does not let it go ahead."""
    if plan.policy_digest != policy.digest:
        raise StaleError(
            f"edit {plan.plan_id} was judged by policy {plan.policy_digest}, this one is {policy.digest}; "
            "name its own with --policy, or roll it back and plan again"
        )


def take_back(workspace: History, plan: Plan, state: State, reason: str) -> None:
    """Undo a committed edit bit for bit, or drop a held one. StaleError for any other state."""
    if state not in ("committed", "held"):
        raise StaleError(f"edit {plan.plan_id} is {state}; only a committed or held edit can be rolled back")
    if state == "held":
        drop(workspace, plan, reason, last_facts(workspace, plan.plan_id))
        return
    before = workspace.store.digest()

    def record(version: VersionRecord) -> None:
        told = {"digest_before_undo": before, "digest_after": version.digest, "by": workspace.user}
        _tell(
            workspace,
            "rolled-back",
            plan,
            {"event": "roll-back", "reason": reason, "undone": True, **told},
        )

    # As with a commit, the record comes before the switch, and `recover` finishes an undo that is on record.
    workspace.store.roll_back(plan.plan_id, before_switch=record)
    outdate(workspace)
    workspace.refresh()


def last_facts(workspace: History, plan_id: str) -> dict[str, Any]:
    """The monitoring on record, without the event it was recorded for."""
    measured = [e for e in workspace.history(plan_id) if "postop" in e.body]
    facts = dict(measured[-1].body) if measured else {}
    for name in ("event", "reason"):
        facts.pop(name, None)
    return facts


def _tell(workspace: History, kind: str, plan: Plan, body: Mapping[str, Any]) -> None:
    workspace.ledger.append(kind, {"plan_id": plan.plan_id, "edit_id": plan.plan_id, **body})
