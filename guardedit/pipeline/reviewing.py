"""What waits for a person, and what the record says to whoever decides. No model, and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guardedit.gate.states import State
from guardedit.pipeline.history import History
from guardedit.records import Judgement, Plan


@dataclass(frozen=True)
class Waiting:
    """A plan that waits for a word, or an edit that the monitor could not decide."""

    plan: Plan
    state: State
    words: tuple[dict[str, Any], ...]
    """Decisions so far, as the ledger has them."""
    difference: dict[str, Any] | None
    """To the plan that it was made anew from; None where there is none."""
    postop: Judgement | None
    """The monitor's findings, of a held edit."""
    drift_digest: str | None


def queue(workspace: History) -> list[str]:
    """Names of what waits, in the order of the plans."""
    return [plan_id for plan_id, state in workspace.states().items() if state in ("needs-approval", "held")]


def waiting(workspace: History, plan_id: str) -> Waiting:
    """One of them, with what is on record about it; plan and chain are compared with their digests."""
    history, state = workspace.history(plan_id), workspace.state(plan_id)
    held = [entry.body for entry in history if entry.kind == "held"] if state == "held" else []
    return Waiting(
        plan=workspace.read_plan(plan_id),
        state=state,
        words=tuple(e.body["decision"] for e in history if e.body.get("decision")),
        difference=difference_of(workspace, plan_id),
        postop=Judgement.model_validate(held[-1]["postop"]) if held else None,
        drift_digest=str(held[-1]["drift_digest"]) if held else None,
    )


def difference_of(workspace: History, plan_id: str) -> dict[str, Any] | None:
    """What `replan` found between this plan and the one it replaces."""
    old = workspace.plan_entry(plan_id).body.get("replaces")
    told = [e.body.get("difference") for e in workspace.ledger.entries("superseded", plan_id=old) if old]
    return told[-1] if told else None


def successor(workspace: History, plan_id: str) -> str | None:
    """Name of the plan that took this one's place."""
    told = workspace.ledger.entries("superseded", plan_id=plan_id)
    return str(told[-1].body["by"]) if told else None
