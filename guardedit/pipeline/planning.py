"""From requests to a plan: complete them, screen them, solve, measure what it would do, judge it, put it on record.

Nothing here writes a weight. A plan that the policy stops is kept all the same: what was refused is part of the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from guardedit.config import cache_folder
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, encode, record_of
from guardedit.edits.gate_shelf import GateShelf
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import StaleError
from guardedit.gate.approvals import check_waivers
from guardedit.gate.policy import judge
from guardedit.gate.screening import judge_stopped
from guardedit.gate.states import advance
from guardedit.models.hooks import key_hook
from guardedit.pipeline.alternatives import in_context_form
from guardedit.pipeline.asking import complete, require_plannable, settle_first
from guardedit.pipeline.expecting import with_expectations
from guardedit.pipeline.kit import MAPS
from guardedit.pipeline.measuring import key_layer, placed, risk_contexts
from guardedit.pipeline.owning import require_policy
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.screening import Screening, screen
from guardedit.pipeline.sealing import Replacing, plan_name, record_plan
from guardedit.pipeline.workspace import Workspace, versions
from guardedit.records import DeltaRecord, EditRequest, Judgement, Plan, RiskReport, Screened, Waiver
from guardedit.risk.key_view import KeyView
from guardedit.risk.measure import measure, measure_keys


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
    replacing: Replacing | None = None,
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
        return _seal(workspace, _solved(workspace, completed, (), editor, settings, waivers), replacing)
    workspace.progress(f"screening {len(completed)} requests", 0.1)
    screening = screen(workspace, completed, key_layer(workspace, settings), waivers)
    refused = screening.stopped and workspace.kit.policy.on_stopped == "refuse"
    if refused or not screening.passed:
        return _seal(workspace, _stopped(workspace, screening, editor, waivers), replacing)
    going_on = tuple(view.request for view in screening.passed)
    draft = _solved(workspace, going_on, screening.passed, editor, settings, waivers)
    return _seal(workspace, replace(draft, stopped=screening.stopped, screened=screening.rows), replacing)


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
    judgement = judge(risk.scores, kit.policy, waivers, "preop", workspace.now(), plans, editor)
    statistics = statistics_of(workspace, editor)
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
            handle, delta, model_digest=handle.digest(), statistics_digests=statistics_of(workspace, editor)
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
        state = workspace.state(plan_id)
        if state in ("stale", "expired"):
            raise StaleError(
                f"plan {plan_id} is {state}; make it anew with `guardedit replan {plan_id}` first"
            )
        advance(state, "supersede")
        check_waivers(waivers, policy, now)
        judgement = judge(old.risk.scores, policy, waivers, "preop", now, old.plans, old.delta.editor)
        delta = workspace.read_delta(old)
        draft = _Draft(old.requests, delta, old.delta, old.risk, judgement, tuple(waivers))
        whole = replace(draft, stopped=old.stopped, screened=old.screened)
        return _seal(workspace, whole, Replacing(plan_id))


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
    gates = GateShelf(cache_folder() / "gates")
    return SolveInputs(
        kit.second_moments, seed, kit.saes, earlier, workspace.progress, gates=gates, maps=kit.maps
    )


def statistics_of(workspace: Workspace, editor: str) -> dict[str, str]:
    """Digests of what the editor draws on; a new map does not make other editors' plans stale."""
    kinds = ("second_moments/", "sae/", *([f"{MAPS}/"] if editor == "remedi" else []))
    return {name: digest for name, digest in workspace.kit.digests.items() if name.startswith(kinds)}


def _seal(workspace: Workspace, draft: _Draft, replacing: Replacing | None = None) -> Plan:
    """Give a draft its name and put it on record; see `record_plan`."""
    store, handle, record = workspace.store, workspace.handle, draft.record
    with editing(workspace):
        if not store.exists:
            store.import_base(handle.manifest(), handle.folder, handle.name)
        plan = Plan(
            plan_id=plan_name(workspace, (*draft.requests, *draft.stopped)),
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
        record_plan(workspace, plan, encode(draft.delta), workspace.kit.policy, replacing)
    return plan
