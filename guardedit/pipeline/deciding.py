"""Words on a plan: who says what, with which key, and whether that lets the plan go ahead."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from guardedit.errors import BadRequestError, BlockedError, HeldError, NeedsApprovalError, StaleError
from guardedit.gate.approvals import decide
from guardedit.gate.keys import PrivateKey
from guardedit.gate.rules import Policy
from guardedit.gate.signatures import (
    DECISION,
    MAX_EMERGENCY_HOURS,
    Case,
    Word,
    check_word,
    counted,
    held,
    proposer,
    require_words,
    words_of,
)
from guardedit.gate.states import Event, State, advance
from guardedit.gate.trust import Role
from guardedit.pipeline.history import History
from guardedit.pipeline.outdating import aged, moved_on
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.signing import signer, trust
from guardedit.records import Decision, Plan, canonical

REVIEW_DAYS = 3
MIN_EMERGENCY_REASON = 20


@dataclass(frozen=True)
class Emergency:
    """What lifts a policy's block: a ticket, and for how many hours."""

    ticket: str
    hours: float = MAX_EMERGENCY_HOURS


@dataclass(frozen=True)
class Heard:
    """A word that a person gave elsewhere: when, and where it was found. It is a name's, never a key's."""

    at: datetime
    where: dict[str, Any]


def demands(policy: Policy) -> dict[str, Any]:
    """What a policy asks of approvals, for the plan's entry: a decision is checked without loading the model."""
    return {
        "demands": policy.model_dump(
            mode="json", include={"approvals", "signed", "separate_approver", "profile", "approval_hours"}
        )
    }


def case_of(workspace: History, plan: Plan, policy: Policy | None = None, *, signed: bool = True) -> Case:
    """What words on a plan are held against; without a policy, against what the plan's entry says it asked for.

    With `signed` false the author is a name alone.
    """
    known, entry = trust(workspace), workspace.plan_entry(plan.plan_id)
    return Case(
        plan.digest,
        plan.author,
        proposer(entry, known) if signed else None,
        policy or Policy.model_construct(**entry.body.get("demands", {})),
        known,
        blocked=plan.judgement.outcome == "blocked",
    )


def require_approved(
    workspace: History, plan: Plan, policy: Policy, drift_digest: str | None = None
) -> Decision:
    """The word that lets a plan, or a held edit, go ahead now; raises as `signatures.require_words` does."""
    case = case_of(workspace, plan, policy)
    words = words_of(workspace.history(plan.plan_id))
    return require_words(words, held(case, drift_digest) if drift_digest else case, workspace.now())


def decide_plan(
    workspace: History,
    plan_id: str,
    outcome: str,
    reason: str,
    approver: str | None = None,
    emergency: Emergency | None = None,
    heard: Heard | None = None,
) -> Decision:
    """Put a person's word on record, bound to the plan's digest (and to the drift report of a held edit).

    Signed where a key is named. BadRequestError, NeedsApprovalError for a key or a name that the policy does not let
    decide, BlockedError, StaleError.
    """
    plan = workspace.read_plan(plan_id)
    event: Event = "reject" if outcome != "approved" else "break-glass" if emergency else "approve"
    key = signer(workspace) if heard is None else None
    with editing(workspace):
        state = workspace.state(plan_id)
        if emergency is not None:
            _require_emergency(emergency, plan, key, reason)
        case = _case(workspace, plan, event)
        state = aged(workspace, plan, state, case.policy)
        _require_open(workspace, plan_id, state, event, emergency)
        case = held(case, drift_digest_of(workspace, plan_id)) if state == "held" else case
        word = _worded(workspace, case, outcome, reason, approver, key, emergency)
        word = word if heard is None else word.model_copy(update={"at": heard.at.isoformat()})
        _record(workspace, plan_id, state, event, case, word, key, heard)
    return word


def _case(workspace: History, plan: Plan, event: Event) -> Case:
    """As `case_of`; a plan can be rejected also where its author's key counts no more."""
    try:
        return case_of(workspace, plan)
    except NeedsApprovalError:
        if event != "reject":
            raise
        return case_of(workspace, plan, signed=False)


def _require_open(
    workspace: History, plan_id: str, state: State, event: Event, emergency: Emergency | None
) -> None:
    """A held edit takes words until it is settled, an approved one takes more approvals."""
    if (state == "held" and emergency is None) or (state, event) == ("approved", "approve"):
        return
    if state in ("stale", "expired"):
        why = ", ".join(moved_on(workspace, plan_id))
        raise StaleError(f"plan {plan_id} is {state}: {why}. Plan it again with `guardedit replan {plan_id}`")
    advance(state, event)


def _require_emergency(emergency: Emergency, plan: Plan, key: PrivateKey | None, reason: str) -> None:
    if not emergency.ticket.strip():
        raise BadRequestError("--break-glass needs a --ticket")
    if not 0 < emergency.hours <= MAX_EMERGENCY_HOURS:
        raise BadRequestError(
            f"--hours is {emergency.hours:g}; more than 0 and at most {MAX_EMERGENCY_HOURS:g}"
        )
    if len(reason.strip()) < MIN_EMERGENCY_REASON:
        raise BadRequestError(f"--break-glass needs a reason of at least {MIN_EMERGENCY_REASON} characters")
    if key is None:
        raise NeedsApprovalError("--break-glass needs a key with that role (--key)")
    if plan.judgement.outcome == "blocked" and not plan.delta.changes:
        raise BlockedError(f"nothing was solved for plan {plan.plan_id}, so there is nothing to let through")


def _worded(
    workspace: History,
    case: Case,
    outcome: str,
    reason: str,
    approver: str | None,
    key: PrivateKey | None,
    emergency: Emergency | None,
) -> Decision:
    role: Role = "break-glass" if emergency else "reviewer"
    known = case.trust.require(key.public.key_id, role) if key else None
    if known is not None and approver not in (None, known.name):
        raise BadRequestError(f"key {known.name} cannot sign in the name of {approver}")
    name, now = known.name if known else approver or workspace.user, workspace.now()
    word = decide(
        case.plan_digest,
        "approved" if outcome == "approved" else "rejected",
        name,
        reason,
        now,
        case.drift_digest,
    )
    key_id = known.key.key_id if known else None
    own = key_id == case.author_key if key_id and case.author_key else word.approver == case.author
    added: dict[str, Any] = {"key": key_id, "own": own}
    if emergency is not None:
        due = (now + timedelta(days=REVIEW_DAYS)).isoformat()
        added |= {"ticket": emergency.ticket.strip(), "hours": emergency.hours, "review_due": due}
    return word.model_copy(update=added)


def _record(
    workspace: History,
    plan_id: str,
    state: State,
    event: Event,
    case: Case,
    word: Decision,
    key: PrivateKey | None,
    heard: Heard | None = None,
) -> None:
    """One entry; it opens the gate when enough words are there."""
    envelope = key.sign(canonical(word), DECISION) if key else None
    body: dict[str, Any] = {
        "plan_id": plan_id, "edit_id": plan_id, "decision": word.model_dump(mode="json"), "envelope": envelope,
    }  # fmt: skip
    body |= {} if heard is None else {"heard": heard.where}
    if word.outcome == "approved":
        history, now = words_of(workspace.history(plan_id)), workspace.now()
        fresh = Word(word, _next(workspace), "decided", envelope)
        # What would not count when the plan is applied is refused now, while the person is still there.
        check_word(fresh, case, now)
        enough = event == "break-glass" or counted([*history, fresh], case, now) >= case.policy.approvals
    else:
        enough = True
    opens = (enough and state not in ("held", "approved")) or (word.outcome == "rejected" and state != "held")
    workspace.ledger.append("decided", {**body, "event": event} if opens else body)


def _next(workspace: History) -> int:
    head = workspace.ledger.head()
    return (head.seq if head else 0) + 1


def drift_digest_of(workspace: History, plan_id: str) -> str:
    """The monitor's report that a held edit waits with. HeldError where none is on record."""
    found = [e for e in workspace.history(plan_id) if e.kind == "held"]
    if not found:
        raise HeldError(f"edit {plan_id} is held, but no monitor report of it is on record; roll it back")
    return str(found[-1].body["drift_digest"])
