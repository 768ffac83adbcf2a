"""Solve a plan again from what is on record, and say how close it comes to the update that the plan holds.

The model is brought to the version that the plan was made on, in memory: home and live model are not written.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from guardedit.editors import EDITORS
from guardedit.edits.activations import ActivationChange
from guardedit.edits.deltas import EditDelta, encode, post_images, restore
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.updates import Change, WeightChange
from guardedit.errors import BadRequestError, GuardeditError, IntegrityError, StaleError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.pipeline.history import states_in
from guardedit.pipeline.kit import require_editor
from guardedit.pipeline.outdating import other_inputs
from guardedit.pipeline.recorded import recorded_settings
from guardedit.pipeline.workspace import Workspace, versions
from guardedit.records import EditRequest, Plan, digest_of_bytes

TOLERANCE = 1e-3
"""Relative Frobenius distance up to which a solve counts as the same; see docs/approvals.md for what was measured."""


def reproduce(workspace: Workspace, edit_id: str, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Solve the edit again on the version that its plan names and compare, tensor by tensor.

    `within_tolerance` is the answer; a distance is ‖ΔW_again − ΔW‖ / ‖ΔW‖ in Frobenius norms. Raises BadRequestError
    where nothing was solved, StaleError where statistics or SAEs are not those of the plan, IntegrityError where a
    record was changed.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise BadRequestError(f"--tolerance is {tolerance!r}; it must be a finite number of at least 0")
    plan = workspace.read_plan(edit_id)
    recorded = workspace.read_delta(plan)
    if not recorded.changes:
        raise BadRequestError(f"nothing was solved for plan {edit_id}, so there is nothing to solve again")
    own = Workspace(workspace.settings, workspace.progress)
    _require_same_inputs(own, plan)
    version = _bring_to(own, plan)
    own.progress(f"solving {edit_id} again with {plan.editor}", 0.2)
    again = EDITORS[plan.editor].solve(own.handle, plan.requests, _settings(plan), _inputs(own, plan))
    rows = _compared(own.handle, recorded, again, plan)
    worst = max(_as_number(row["distance"]) for row in rows)
    return {
        "edit_id": edit_id, "plan_digest": plan.digest, "editor": plan.editor, "version": version,
        "model_digest": plan.model_digest, "seed": plan.seed, "tolerance": tolerance,
        "within_tolerance": worst <= tolerance, "bit_identical": all(row["bit_identical"] for row in rows),
        "same_delta_file": digest_of_bytes(encode(again)) == plan.delta.file_digest,
        "distance": worst if math.isfinite(worst) else None, "tensors": rows,
        "platform": {"machine": platform.machine(), "threads": torch.get_num_threads(), **versions()},
        "differs": _differs(plan),
    }  # fmt: skip


def _as_number(distance: float | None) -> float:
    return math.inf if distance is None or math.isnan(distance) else distance


def _differs(plan: Plan) -> dict[str, str]:
    """Software that is another one than when the plan was made."""
    now = versions()
    return {
        name: f"{then} -> {now.get(name)}" for name, then in plan.versions.items() if now.get(name) != then
    }


def _require_same_inputs(workspace: Workspace, plan: Plan) -> None:
    require_editor(plan.editor)
    other = sorted(other_inputs(plan, workspace.kit.digests))
    if other:
        raise StaleError(
            f"plan {plan.plan_id} was solved with another {', '.join(other)}; without the same files it cannot be "
            "solved again"
        )


def _bring_to(workspace: Workspace, plan: Plan) -> str:
    """The loaded model as it was when the plan was made, from stored bytes whose digests are compared."""
    lineage, handle = workspace.store.lineage(), workspace.handle
    known = {lineage.base.digest: "base"} | {v.digest: v.name for v in reversed(lineage.versions)}
    if plan.model_digest not in known:
        raise IntegrityError(
            f"plan {plan.plan_id} was made on {plan.model_digest}, which was never live here"
        )
    version = known[plan.model_digest]
    then, here = workspace.store.manifest(version), handle.manifest()
    moved = sorted(name for name in here.keys() | then.keys() if then.get(name) != here.get(name))
    restore(handle, {name: workspace.tensor(name, version) for name in moved})
    if handle.digest() != plan.model_digest:
        raise IntegrityError(
            f"the model of version {version} is {handle.digest()}, the plan says {plan.model_digest}"
        )
    return version


def _settings(plan: Plan) -> Any:
    """The editor's settings as the plan's record has them."""
    named, unclear = recorded_settings(plan)
    if unclear:
        raise BadRequestError(
            f"plan {plan.plan_id}: a context holds '|', so the record does not say where one ends"
        )
    return EDITORS[plan.editor].hparams(**named)


def _inputs(workspace: Workspace, plan: Plan) -> SolveInputs:
    kit = workspace.kit
    earlier = tuple(
        request for plan_id in _live_then(workspace, plan) for request in _asked(workspace, plan_id)
    )
    return SolveInputs(kit.second_moments, plan.seed, kit.saes, earlier, workspace.progress, maps=kit.maps)


def _asked(workspace: Workspace, plan_id: str) -> Iterable[EditRequest]:
    return workspace.read_plan(plan_id).requests


def _live_then(workspace: Workspace, plan: Plan) -> list[str]:
    """Plans that were committed when this one was made, in the order in which they were planned."""
    before = workspace.plan_entry(plan.plan_id).seq
    states = states_in(workspace.ledger.entries()[: before - 1])
    return [plan_id for plan_id, state in states.items() if state == "committed"]


def _compared(handle: ModelHandle, recorded: EditDelta, again: EditDelta, plan: Plan) -> list[dict[str, Any]]:
    """A row for each tensor that one of the two changes."""
    then, now = ({_place(c): c for c in delta.changes} for delta in (recorded, again))
    digests = {change.parameter: change.digest_after for change in plan.delta.changes}
    made = _images(handle, again)
    return [
        _row(name, then.get(name), now.get(name), digests, made) for name in sorted(then.keys() | now.keys())
    ]


def _images(handle: ModelHandle, delta: EditDelta) -> Mapping[str, str]:
    try:
        return {name: tensor_digest(image) for name, image in post_images(handle, delta).items()}
    except GuardeditError:
        return {}


def _place(change: Change) -> str:
    """A name that both solves share: an activation edit's own name is a digest of its bytes."""
    return (
        f"activation edit of layer {change.layer}"
        if isinstance(change, ActivationChange)
        else change.parameter
    )


def _row(
    name: str, then: Change | None, now: Change | None, digests: Mapping[str, str], made: Mapping[str, str]
) -> dict[str, Any]:
    same = then is not None and now is not None and digests.get(then.parameter) == made.get(now.parameter, "")
    apart = _distance(then, now)
    # The updates may differ where the tensors that they make are cast to the same bytes.
    return {"tensor": name, "bit_identical": same, "distance": 0.0 if same and apart is None else apart}


def _distance(then: Change | None, now: Change | None) -> float | None:
    """None where the two cannot be compared: one of them is not there, or has another shape."""
    one, two = (_matrix(change) for change in (then, now))
    if one is None or two is None or one.shape != two.shape:
        return None
    norm, apart = float(one.norm()), float((two - one).norm())
    return apart / norm if norm else (0.0 if apart == 0 else None)


def _matrix(change: Change | None) -> torch.Tensor | None:
    if isinstance(change, WeightChange):
        return change.update.dense().double()
    if isinstance(change, ActivationChange):
        action = change.action
        found = action.update.dense() if hasattr(action, "update") else action.direction
        return found.double()
    return None
