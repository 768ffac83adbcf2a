"""From requests to a plan: complete them, screen them, solve, measure what it would do, judge it, put it on record.

Nothing here writes a weight. A plan that the policy stops is kept all the same: what was refused is part of the record.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from guardedit.audit.files import make_folder, write_atomic
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, encode, record_of
from guardedit.edits.inputs import SolveInputs
from guardedit.gate.approvals import check_waivers, decide
from guardedit.gate.policy import judge
from guardedit.gate.screening import judge_stopped
from guardedit.gate.states import advance
from guardedit.models.hooks import key_hook
from guardedit.pipeline.alternatives import FILE, in_context_form, request_lines
from guardedit.pipeline.asking import complete, require_plannable, settle_first
from guardedit.pipeline.deciding import demands
from guardedit.pipeline.expecting import with_expectations
from guardedit.pipeline.kit import MAPS
from guardedit.pipeline.measuring import key_layer, placed, risk_contexts
from guardedit.pipeline.policies import require_policy
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.screening import Screening, screen
from guardedit.pipeline.signing import proposal
from guardedit.pipeline.workspace import Workspace, versions
from guardedit.records import (
    DeltaRecord,
    EditRequest,
    Judgement,
    Plan,
    RiskReport,
    Screened,
    Waiver,
    canonical,
    digest_of_bytes,
)
from guardedit.risk.key_view import KeyView
from guardedit.risk.measure import measure, measure_keys

_EVENTS = {"auto-approved": "pass", "needs-approval": "ask", "blocked": "block"}


@dataclass(frozen=True)
class _Draft:
    """What a plan is made of, before it has a name."""

    requests: tuple[EditRequest, ...]
    delta: EditDelta
    record: DeltaRecord
    risk: RiskReport
    judgement: Judgement
    waivers: tuple[Waiver, ...]
    stopped: tuple[EditRequest, ...] = ()
    screened: tuple[Screened, ...] = ()


def make_plan(
    workspace: Workspace,
    requests: EditRequest | Sequence[EditRequest],
    editor: str = "rome",
    waivers: Sequence[Waiver] = (),
    hparams: Mapping[str, Any] | None = None,
) -> Plan:
    """Solve, measure and judge one request, or many as one edit, on the live model, and put the plan on record.

    Many are screened one by one from their keys first. Those that the policy stops are left out and listed; where the
    policy says `on_stopped = "refuse"`, or none is left, nothing is solved and the plan is on record as blocked.
    Raises BadRequestError, MissingStatisticsError, SolveError; then neither model nor ledger has changed.
    """
    asked = (requests,) if isinstance(requests, EditRequest) else tuple(requests)
    require_plannable(editor, asked)
    settle_first(workspace)
    require_policy(workspace, workspace.kit.policy)
    settings = workspace.kit.settings(editor, hparams)
    check_waivers(waivers, workspace.kit.policy, workspace.now())
    completed = tuple(complete(workspace.handle, request) for request in asked)
    if len(completed) == 1:
        return _seal(workspace, _solved(workspace, completed, (), editor, settings, waivers))
    workspace.progress(f"screening {len(completed)} requests", 0.1)
    screening = screen(workspace, completed, key_layer(workspace, settings), waivers)
    refused = screening.stopped and workspace.kit.policy.on_stopped == "refuse"
    if refused or not screening.passed:
        return _seal(workspace, _stopped(workspace, screening, editor, waivers))
    going_on = tuple(view.request for view in screening.passed)
    draft = _solved(workspace, going_on, screening.passed, editor, settings, waivers)
    return _seal(workspace, replace(draft, stopped=screening.stopped, screened=screening.rows))


def _solved(
    workspace: Workspace,
    requests: tuple[EditRequest, ...],
    views: tuple[KeyView, ...],
    editor: str,
    settings: Any,
    waivers: Sequence[Waiver],
) -> _Draft:
    """The requests solved as one edit, measured and judged; `views` are those of their screening, if there was one."""
    kit, handle = workspace.kit, workspace.handle
    workspace.progress(f"solving with {editor}", 0.2)
    delta = EDITORS[editor].solve(handle, requests, settings, _inputs(workspace))
    workspace.progress("measuring what else would change", 0.7)
    risk = _risk(workspace, requests, views, delta, key_layer(workspace, settings))
    plans: Literal["one", "many"] = "many" if len(requests) > 1 else "one"
    judgement = judge(risk.scores, kit.policy, waivers, "preop", workspace.now(), plans)
    statistics = _statistics(workspace, editor)
    record = record_of(handle, delta, model_digest=handle.digest(), statistics_digests=statistics)
    return _Draft(requests, delta, record, risk, judgement, tuple(waivers))


def _stopped(workspace: Workspace, screening: Screening, editor: str, waivers: Sequence[Waiver]) -> _Draft:
    """A plan that ends with its screening: it changes nothing, and is on record as blocked."""
    handle = workspace.handle
    delta = EditDelta((), editor, {}, {})
    return _Draft(
        requests=tuple(view.request for view in screening.passed),
        delta=delta,
        record=record_of(
            handle, delta, model_digest=handle.digest(), statistics_digests=_statistics(workspace, editor)
        ),
        risk=measure_keys(screening.views),
        judgement=judge_stopped(screening.rows, workspace.kit.policy),
        waivers=tuple(waivers),
        stopped=screening.stopped,
        screened=screening.rows,
    )


def waive(workspace: Workspace, plan_id: str, waivers: Sequence[Waiver]) -> Plan:
    """The same solved edit judged again with waivers: a new plan, which supersedes the one it was made of.

    Raises BadRequestError for a waiver that could lift nothing, StaleError where the plan is past deciding.
    """
    old, policy, now = workspace.read_plan(plan_id), workspace.kit.policy, workspace.now()
    require_policy(workspace, policy)
    with editing(workspace):
        advance(workspace.state(plan_id), "supersede")
        check_waivers(waivers, policy, now)
        judgement = judge(old.risk.scores, policy, waivers, "preop", now, old.plans)
        delta = workspace.read_delta(old)
        draft = _Draft(old.requests, delta, old.delta, old.risk, judgement, tuple(waivers))
        made = _seal(workspace, replace(draft, stopped=old.stopped, screened=old.screened))
        body = {"event": "supersede", "plan_id": plan_id, "edit_id": plan_id, "by": made.plan_id}
        workspace.ledger.append("superseded", body)
    return made


def _risk(
    workspace: Workspace,
    requests: tuple[EditRequest, ...],
    views: tuple[KeyView, ...],
    delta: EditDelta,
    layer: int,
) -> RiskReport:
    """The report of a delta, with the contexts of all its layers; keys are looked at in `layer`."""
    known = {view.context.layer: view.context for view in views}
    # Banks of layers without a second moment would be read for nothing: the sum over the layers has no value.
    measurable = [one for one in delta.layers if key_hook(one) in workspace.kit.second_moments]
    wanted = tuple(dict.fromkeys((layer, *measurable)))
    fresh = [one for one in wanted if one not in known]
    contexts = known | (risk_contexts(workspace, fresh) if fresh else {})
    others = [contexts[one] for one in wanted[1:]]
    report = measure(contexts[layer], requests, delta, others, views)
    many = len(requests) > 1
    ranked = report.model_copy(update={"scores": placed(workspace, report.scores, layer, delta.layers, many)})
    return with_expectations(ranked, workspace.kit.risk_models, delta.editor, delta.layers, many)


def _inputs(workspace: Workspace) -> SolveInputs:
    """What the editor may draw on: the kit's statistics and SAEs, and what is live already."""
    kit, seed = workspace.kit, workspace.settings.seed
    states = workspace.states() if workspace.store.exists else {}
    live = [plan_id for plan_id, state in states.items() if state == "committed"]
    earlier = tuple(request for plan_id in live for request in workspace.read_plan(plan_id).requests)
    return SolveInputs(kit.second_moments, seed, kit.saes, earlier, workspace.progress, maps=kit.maps)


def _statistics(workspace: Workspace, editor: str) -> dict[str, str]:
    """Digests of what the editor draws on; a new map does not make other editors' plans stale."""
    kinds = ("second_moments/", "sae/", *([f"{MAPS}/"] if editor == "remedi" else []))
    return {name: digest for name, digest in workspace.kit.digests.items() if name.startswith(kinds)}


def _seal(workspace: Workspace, draft: _Draft) -> Plan:
    """Write plan and delta, then the ledger's entry: what is not in the ledger was never planned."""
    store, handle, record = workspace.store, workspace.handle, draft.record
    with editing(workspace):
        if not store.exists:
            store.import_base(handle.manifest(), handle.folder, handle.name)
        plan = Plan(
            plan_id=_plan_id(workspace, (*draft.requests, *draft.stopped)),
            created=workspace.now().isoformat(),
            author=workspace.user,
            requests=draft.requests,
            stopped=draft.stopped,
            screened=draft.screened,
            editor=record.editor,
            model_name=handle.name,
            model_digest=record.model_digest,
            base_digest=store.base().digest,
            delta=record,
            risk=draft.risk,
            judgement=draft.judgement,
            waivers=draft.waivers,
            policy_digest=draft.judgement.policy_digest,
            seed=workspace.settings.seed,
            versions=versions(),
            alternative=in_context_form(draft.requests, draft.judgement, workspace.kit.policy),
        )
        _store(workspace.plan_folder(plan.plan_id), plan, draft.delta)
        workspace.ledger.append("planned", _planned(workspace, plan))
    return plan


def _planned(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    word, asked = _own_word(workspace, plan), demands(workspace.kit.policy)
    return {**_entry(plan), **asked, **word, **proposal(workspace, plan.digest)}


def _own_word(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """The policy's decision, where it approves: in the plan's own entry, so that no crash can part the two."""
    if plan.judgement.outcome != "auto-approved":
        return {}
    word = decide(plan.digest, "auto-approved", "policy", plan.judgement.reason, workspace.now())
    return {"decision": word.model_dump(mode="json")}


def _store(folder: Path, plan: Plan, delta: EditDelta) -> None:
    make_folder(folder)
    write_atomic(folder / "delta.safetensors", encode(delta))
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


def _plan_id(workspace: Workspace, requests: Sequence[EditRequest]) -> str:
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
