"""From a request to a plan: complete it, solve it, measure what it would do, judge it, put it on record.

Nothing here writes a weight. A plan that the policy stops is kept all the same: what was refused is part of the record.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardedit.audit.files import make_folder, write_atomic
from guardedit.drift.probes import top_answer
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, encode, record_of
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError
from guardedit.gate.approvals import check_waivers, decide
from guardedit.gate.policy import judge
from guardedit.gate.reference import with_percentiles
from guardedit.gate.states import advance
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook, mlp_hook
from guardedit.pipeline.kit import require_editor
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.trying import continued
from guardedit.pipeline.workspace import Workspace, versions
from guardedit.records import (
    DeltaRecord,
    EditRequest,
    Judgement,
    Plan,
    RiskReport,
    Waiver,
    canonical,
    digest_of_bytes,
)
from guardedit.risk.banks import control_bank, protected_bank
from guardedit.risk.measure import RiskContext, measure

_EVENTS = {"auto-approved": "pass", "needs-approval": "ask", "blocked": "block"}


def make_plan(
    workspace: Workspace,
    request: EditRequest,
    editor: str = "rome",
    waivers: Sequence[Waiver] = (),
    hparams: Mapping[str, Any] | None = None,
) -> Plan:
    """Solve, measure and judge one request on the live model, and put the plan on record.

    Raises BadRequestError, MissingStatisticsError, SolveError; then neither model nor ledger has changed.
    """
    require_editor(editor)
    _settle_first(workspace)
    kit, handle = workspace.kit, workspace.handle
    settings = kit.settings(editor, hparams)
    check_waivers(waivers, kit.policy, workspace.now())
    completed = complete(handle, request)
    workspace.progress(f"solving with {editor}", 0.2)
    delta = EDITORS[editor].solve(handle, [completed], settings, _inputs(workspace))
    workspace.progress("measuring what else would change", 0.7)
    risk = _risk(workspace, completed, delta)
    judgement = judge(risk.scores, kit.policy, waivers, "preop", workspace.now())
    record = record_of(handle, delta, model_digest=handle.digest(), statistics_digests=_statistics(workspace))
    return _seal(workspace, completed, delta, record, risk, judgement, tuple(waivers))


def waive(workspace: Workspace, plan_id: str, waivers: Sequence[Waiver]) -> Plan:
    """The same solved edit judged again with waivers: a new plan, which supersedes the one it was made of.

    Raises BadRequestError for a waiver that could lift nothing, StaleError where the plan is past deciding.
    """
    old, policy, now = workspace.read_plan(plan_id), workspace.kit.policy, workspace.now()
    with editing(workspace):
        advance(workspace.state(plan_id), "supersede")
        check_waivers(waivers, policy, now)
        judgement = judge(old.risk.scores, policy, waivers, "preop", now)
        delta = workspace.read_delta(old)
        made = _seal(workspace, old.requests[0], delta, old.delta, old.risk, judgement, tuple(waivers))
        body = {"event": "supersede", "plan_id": plan_id, "edit_id": plan_id, "by": made.plan_id}
        workspace.ledger.append("superseded", body)
    return made


def understood(workspace: Workspace, requests: Sequence[EditRequest], editor: str) -> tuple[EditRequest, ...]:
    """The requests, completed: whatever is wrong with one of them is found before anything is solved for another.

    Raises BadRequestError for an unknown editor, or a request that asks for what the model says already.
    """
    require_editor(editor)
    workspace.kit.settings(editor)
    _settle_first(workspace)
    return tuple(complete(workspace.handle, request) for request in requests)


def complete(handle: ModelHandle, request: EditRequest) -> EditRequest:
    """The request with what the model says today as `target_true`, where it names none.

    Raises BadRequestError where the model says the new target already.
    """
    if request.target_true is not None:
        return request
    answer, wanted = top_answer(handle, request.filled), request.target_new.strip()
    # A token can begin many words: the whole target is compared.
    if wanted.startswith(answer) and _says(handle, request.filled, wanted):
        raise BadRequestError(
            f"the model already answers {wanted!r} to {request.filled!r}; name target_true if you mean to strengthen it"
        )
    return request.model_copy(update={"target_true": answer})


def _settle_first(workspace: Workspace) -> None:
    """Plan on what is live: put right what a crash left, and take over what another process committed."""
    if workspace.store.exists:
        with editing(workspace):
            pass


def _says(handle: ModelHandle, prompt: str, answer: str) -> bool:
    """Whether the model's greedy continuation begins with the whole answer."""
    length = int(handle.encode([f" {answer}"])["attention_mask"].sum())
    return continued(handle, prompt, length + 1).strip().startswith(answer)


def _risk(workspace: Workspace, request: EditRequest, delta: EditDelta) -> RiskReport:
    report = measure(risk_context(workspace), [request], delta)
    return report.model_copy(update={"scores": with_percentiles(report.scores, workspace.kit.preop_bank)})


def risk_context(workspace: Workspace) -> RiskContext:
    """What the risk room measures with: second moment, SAEs and banks of the kit's layer."""
    kit, handle, seed = workspace.kit, workspace.handle, workspace.settings.seed
    return RiskContext(
        handle,
        kit.layer,
        kit.second_moments[key_hook(kit.layer)],
        key_sae=kit.key_sae,
        mlp_sae=kit.monitors.get(mlp_hook(kit.layer)),
        bank=control_bank(handle, kit.layer, seed=seed),
        protected=protected_bank(handle, kit.layer, seed=seed),
        seed=seed,
        contexts=tuple(kit.hparams.get("rome", {}).get("contexts", ("",))),
    )


def _inputs(workspace: Workspace) -> SolveInputs:
    """What the editor may draw on: the kit's statistics and SAEs, and what is live already."""
    kit, seed = workspace.kit, workspace.settings.seed
    live = [plan_id for plan_id, state in workspace.states().items() if state == "committed"]
    earlier = tuple(request for plan_id in live for request in workspace.read_plan(plan_id).requests)
    return SolveInputs(kit.second_moments, seed, kit.saes, earlier, workspace.progress)


def _statistics(workspace: Workspace) -> dict[str, str]:
    kit = workspace.kit
    return {
        name: digest for name, digest in kit.digests.items() if name.startswith(("second_moments/", "sae/"))
    }


def _seal(
    workspace: Workspace,
    request: EditRequest,
    delta: EditDelta,
    record: DeltaRecord,
    risk: RiskReport,
    judgement: Judgement,
    waivers: tuple[Waiver, ...],
) -> Plan:
    """Write plan and delta, then the ledger's entry: what is not in the ledger was never planned."""
    store, handle = workspace.store, workspace.handle
    with editing(workspace):
        if not store.exists:
            store.import_base(handle.manifest(), handle.folder, handle.name)
        plan = Plan(
            plan_id=_plan_id(workspace, request),
            created=workspace.now().isoformat(),
            author=workspace.user,
            requests=(request,),
            editor=record.editor,
            model_name=handle.name,
            model_digest=record.model_digest,
            base_digest=store.base().digest,
            delta=record,
            risk=risk,
            judgement=judgement,
            waivers=waivers,
            policy_digest=judgement.policy_digest,
            seed=workspace.settings.seed,
            versions=versions(),
        )
        _store(workspace.plan_folder(plan.plan_id), plan, delta)
        workspace.ledger.append("planned", {**_entry(plan), **_own_word(workspace, plan)})
    return plan


def _own_word(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """The policy's decision, where it approves: in the plan's own entry, so that no crash can part the two."""
    if plan.judgement.outcome != "auto-approved":
        return {}
    word = decide(plan.digest, "auto-approved", "policy", plan.judgement.reason, workspace.now())
    return {"decision": word.model_dump(mode="json")}


def _store(folder: Path, plan: Plan, delta: EditDelta) -> None:
    make_folder(folder)
    write_atomic(folder / "delta.safetensors", encode(delta))
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
        "scores": {score.name: score.value for score in plan.risk.scores},
        "waivers": [waiver.model_dump(mode="json") for waiver in plan.waivers],
    }


def _plan_id(workspace: Workspace, request: EditRequest) -> str:
    """A short name that says what it is about, with a running number."""
    number = len(workspace.ledger.entries("planned")) + 1
    plain = (
        unicodedata.normalize("NFKD", f"{request.subject} {request.target_new}")
        .encode("ascii", "ignore")
        .decode()
    )
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:40].strip("-") or "edit"
    return f"{number:04d}-{slug}"


def read_requests(path: Path) -> tuple[EditRequest, ...]:
    """Requests of a YAML or JSON file: one mapping, or a list of them.

    Raises BadRequestError naming the file, the entry and the key.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequestError(f"{path} cannot be read: {error}") from error
    entries = raw if isinstance(raw, list) else [raw]
    if not entries:
        raise BadRequestError(f"{path} holds no request")
    return tuple(
        read_request(entry, f"{path}, request {number}") for number, entry in enumerate(entries, start=1)
    )


def read_request(entry: Any, where: str) -> EditRequest:
    """One request; raises BadRequestError naming `where`, the key, the value and what is allowed."""
    from pydantic import ValidationError

    if not isinstance(entry, dict):
        raise BadRequestError(f"{where} is {type(entry).__name__}; a request is a mapping of {_keys()}")
    unknown = sorted(str(key) for key in entry if key not in EditRequest.model_fields)
    if unknown:
        raise BadRequestError(f"{where}: unknown key {unknown[0]!r}; allowed are {_keys()}")
    try:
        return EditRequest.model_validate(entry)
    except BadRequestError as error:
        raise BadRequestError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequestError(
            f"{where}: {place}: {first['msg']}, got {first.get('input')!r}"[:400]
        ) from error


def _keys() -> str:
    return ", ".join(EditRequest.model_fields)
