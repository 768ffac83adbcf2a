"""A plan put on record: its files, then the ledger's entry, then what becomes of the plan it replaces. No torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.audit.files import make_folder, write_atomic
from guardedit.gate.approvals import decide
from guardedit.gate.rules import Policy
from guardedit.gate.states import advance
from guardedit.pipeline.alternatives import FILE, request_lines
from guardedit.pipeline.deciding import demands
from guardedit.pipeline.history import History
from guardedit.pipeline.outdating import record_superseded
from guardedit.pipeline.signing import proposal
from guardedit.records import (
    EditRequest,
    Plan,
    canonical,
    digest_of_bytes,
)

_EVENTS = {"auto-approved": "pass", "needs-approval": "ask", "blocked": "block"}


@dataclass(frozen=True)
class Replacing:
    """The plan that a new one takes the place of, and what to put on record about the two."""

    plan_id: str
    told: Callable[[Plan], dict[str, Any]] = lambda _: {}


def record_plan(
    workspace: History, plan: Plan, delta: bytes, policy: Policy, replacing: Replacing | None = None
) -> None:
    """Write plan and solved update, then the ledger's entry: what is not in the ledger was never planned.

    The plan that it replaces is superseded then; the error of its state where it is past that, and nothing is written.
    The caller holds the lock.
    """
    if replacing is not None:
        advance(workspace.state(replacing.plan_id), "supersede")
    _store(workspace.plan_folder(plan.plan_id), plan, delta)
    named = {"replaces": replacing.plan_id} if replacing else {}
    workspace.ledger.append("planned", {**_planned(workspace, plan, policy), **named})
    if replacing is not None:
        record_superseded(workspace, replacing.plan_id, plan.plan_id, replacing.told(plan))


def _planned(workspace: History, plan: Plan, policy: Policy) -> dict[str, Any]:
    word, asked = _own_word(workspace, plan), demands(policy)
    return {**_entry(plan), **asked, **word, **proposal(workspace, plan.digest)}


def _own_word(workspace: History, plan: Plan) -> dict[str, Any]:
    """The policy's decision, where it approves: in the plan's own entry, so that no crash can part the two."""
    if plan.judgement.outcome != "auto-approved":
        return {}
    word = decide(plan.digest, "auto-approved", "policy", plan.judgement.reason, workspace.now())
    return {"decision": word.model_dump(mode="json")}


def _store(folder: Path, plan: Plan, delta: bytes) -> None:
    make_folder(folder)
    write_atomic(folder / "delta.safetensors", delta)
    if plan.alternative:
        write_atomic(folder / FILE, request_lines(plan.alternative))
    write_atomic(folder / "plan.json", canonical(plan))


def _entry(plan: Plan) -> dict[str, Any]:
    return {
        "event": _EVENTS[plan.judgement.outcome],
        "plan_id": plan.plan_id,
        "edit_id": plan.plan_id,
        "plan_digest": digest_of_bytes(canonical(plan)),
        "delta_digest": plan.delta.file_digest,
        "model_digest": plan.model_digest,
        "policy_digest": plan.policy_digest,
        "editor": plan.editor,
        "author": plan.author,
        "outcome": plan.judgement.outcome,
        "reason": plan.judgement.reason,
        "requests": [request.model_dump(mode="json") for request in plan.requests],
        **_left_out(plan),
        "scores": {score.name: score.value for score in plan.risk.scores},
        "waivers": [waiver.model_dump(mode="json") for waiver in plan.waivers],
    }


def _left_out(plan: Plan) -> dict[str, Any]:
    """What a joint plan leaves out, and why."""
    if not plan.is_joint:
        return {}
    reasons = [row.reason for row in plan.screened if row.stopped]
    named = [request.model_dump(mode="json") for request in plan.stopped]
    return {"stopped": [{"request": one, "reason": why} for one, why in zip(named, reasons, strict=True)]}


def plan_name(workspace: History, requests: Sequence[EditRequest]) -> str:
    """A short name that says what it is about, with a running number."""
    number = len(workspace.ledger.entries("planned")) + 1
    first = requests[0]
    what = (
        f"{first.subject} {first.target_new}"
        if len(requests) == 1
        else f"{len(requests)} facts {first.subject}"
    )
    plain = unicodedata.normalize("NFKD", what).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:40].strip("-") or "edit"
    return f"{number:04d}-{slug}"
