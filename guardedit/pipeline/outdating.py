"""What time and other edits do to a plan that waits: a commit or an undo outdates it, and a word gets too old.

Both are transitions like others: a ledger entry each, so that nobody has to try a plan to learn that it is of no use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from guardedit.audit.ledger import Entry
from guardedit.gate.approvals import hours_of, lapsed
from guardedit.gate.rules import Policy
from guardedit.gate.states import PENDING, State, advance, allowed
from guardedit.pipeline.history import History, states_in
from guardedit.records import Plan


def overtaken(entries: Iterable[Entry], states: Mapping[str, State], live: str) -> dict[str, str]:
    """Plans that wait and were made on another model than the live one -> digest of that model."""
    bodies = [e.body for e in entries if e.kind == "planned" and states.get(e.body["plan_id"]) in PENDING]
    return {
        body["plan_id"]: body["model_digest"] for body in bodies if body.get("model_digest", live) != live
    }


def outdate(workspace: History) -> list[str]:
    """Put on record that these plans are stale, once something else went live; the caller holds the lock."""
    live, entries = workspace.store.digest(), workspace.ledger.entries()
    found = overtaken(entries, states_in(entries), live)
    for plan_id, digest in found.items():
        record_outdated(workspace, plan_id, [f"the model ({digest} -> {live})"])
    return list(found)


def record_outdated(workspace: History, plan_id: str, moved: Sequence[str]) -> None:
    """One plan is stale; `moved` says what is another than when it was made."""
    body = {"event": "outdate", "plan_id": plan_id, "edit_id": plan_id, "moved": list(moved)}
    workspace.ledger.append("outdated", body)


def moved_since(plan: Plan, live: str, policy_digest: str, inputs: Mapping[str, str]) -> list[str]:
    """What the plan was made from and is another today, in words; `inputs`: name -> digest of what there is now."""
    named = [f"the model ({plan.model_digest} -> {live})"] if plan.model_digest != live else []
    named += ["the policy"] if plan.policy_digest != policy_digest else []
    return named + other_inputs(plan, inputs)


def other_inputs(plan: Plan, inputs: Mapping[str, str]) -> list[str]:
    """Statistics, SAEs and maps that the plan was solved with and that are others today."""
    return [name for name, digest in plan.delta.statistics_digests.items() if inputs.get(name) != digest]


def aged(workspace: History, plan: Plan, state: State, policy: Policy) -> State:
    """The state that the clock leaves: `expired`, once that is on record, where the last yes is too old."""
    word = workspace.decision(plan.plan_id) if state in ("approved", "auto-approved") else None
    if word is None or word.plan_digest != plan.digest or not lapsed(word, policy, workspace.now()):
        return state
    reason = f"the approval of {word.at} has expired after {hours_of(word, policy):g} h"
    body = {"event": "expire", "plan_id": plan.plan_id, "edit_id": plan.plan_id, "reason": reason}
    workspace.ledger.append("expired", body)
    return advance(state, "expire")


def record_superseded(
    workspace: History, plan_id: str, by: str, more: Mapping[str, Any] | None = None
) -> None:
    """A new plan takes the place of an old one."""
    body = {"event": "supersede", "plan_id": plan_id, "edit_id": plan_id, "by": by, **(more or {})}
    workspace.ledger.append("superseded", body)


def half_replaced(entries: Iterable[Entry], states: Mapping[str, State]) -> dict[str, str]:
    """Plans whose replacement is on record while they still wait: the process ended in between. Old -> new."""
    planned = [e.body for e in entries if e.kind == "planned" and e.body.get("replaces")]
    return {
        body["replaces"]: body["plan_id"]
        for body in planned
        if "supersede" in allowed(states.get(body["replaces"], "superseded"))
    }


def moved_on(workspace: History, plan_id: str) -> list[str]:
    """What made a stale or expired plan so, as the ledger has it; empty where it is neither."""
    for entry in reversed(workspace.history(plan_id)):
        if entry.kind == "outdated":
            return [str(one) for one in entry.body.get("moved", ())]
        if entry.kind == "expired":
            return [str(entry.body.get("reason", ""))]
    return []
