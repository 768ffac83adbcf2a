"""The edited facts of the live model, with what was measured about each edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardedit.audit.chain import Entry
from guardedit.audit.period import LiveFact
from guardedit.records import EditRequest, Plan

EFFECTS = (
    "subject_lost_top1", "near_lost_top1", "far_lost_top1", "subject_kl", "near_kl", "far_kl", "perplexity_ratio",
)  # fmt: skip
"""What a reader of a model card asks first: answers lost, and how far predictions moved."""


def live_facts(
    plans: Mapping[str, Plan], states: Mapping[str, str], entries: tuple[Entry, ...]
) -> tuple[LiveFact, ...]:
    """One row a fact, in the order in which the edits were committed."""
    live = {plan_id for plan_id, state in states.items() if state == "committed"}
    commits = {
        e.body["plan_id"]: e.body for e in entries if e.kind == "committed" and e.body["plan_id"] in live
    }
    return tuple(
        _fact(plans[plan_id], number, request, body)
        for plan_id, body in commits.items()
        if plan_id in plans
        for number, request in enumerate(plans[plan_id].requests)
    )


def _fact(plan: Plan, number: int, request: EditRequest, body: dict[str, Any]) -> LiveFact:
    rows = body.get("outcomes") or ()
    means = body.get("target_probabilities") or {}
    alone = {"p_new_before": means.get("new_before"), "p_new_after": means.get("new_after")}
    own = rows[number] if number < len(rows) else alone
    return LiveFact(
        plan_id=plan.plan_id,
        editor=plan.editor,
        request=request,
        p_new_before=own.get("p_new_before"),
        p_new_after=own.get("p_new_after"),
        effects=_effects(body.get("drift") or {}),
    )


def _effects(drift: dict[str, Any]) -> tuple[tuple[str, float | None, str], ...]:
    found = {score["name"]: score for score in drift.get("scores", ())}
    return tuple((name, found[name]["value"], found[name]["unit"]) for name in EFFECTS if name in found)
