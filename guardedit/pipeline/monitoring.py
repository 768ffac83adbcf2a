"""The staged copy against the previous version, and against the lineage's base: small edits must not add up unseen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from guardedit.drift.measure import drift_cache, measure_drift
from guardedit.drift.probes import FAR_TOKENS, FAR_TOKENS_THOROUGH, ProbeSet, build_probes
from guardedit.drift.sides import BaseSide, base_side
from guardedit.edits.deltas import restore, saved
from guardedit.errors import IntegrityError
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.workspace import Workspace
from guardedit.records import DriftReport, Plan
from guardedit.risk.many import probes_around_all
from guardedit.risk.neighbours import ProbeSizes

MONITOR_SIZES = ProbeSizes(subject=96, near=120, entailed=8, target=6)
"""Prompts per scope; subject and near together are the bystanders closest to the edit."""


def monitor(workspace: Workspace, plan: Plan) -> tuple[DriftReport, DriftReport | None]:
    """Measure the staged copy: against the live version, and against the base where that is another version."""
    changed = _changed_in_lineage(workspace, plan)
    probes = probes_of(workspace, plan)
    previous = reference_side(workspace, probes, changed)
    with workspace.staged(plan.plan_id) as handle:
        drift = _measure(workspace, handle, previous, probes, "previous")
    del previous
    if not workspace.store.live_overrides():
        return drift, None
    with at_base(workspace):
        base = reference_side(workspace, probes, changed)
    with workspace.staged(plan.plan_id) as handle:
        return drift, _measure(workspace, handle, base, probes, "base")


def probes_of(workspace: Workspace, plan: Plan) -> ProbeSet:
    """What both sides read: control text, each request of the plan in all its wordings, and prompts around them.

    Of many requests, `MONITOR_SIZES` are shared; beyond some two dozen, the prompts stand around a sample of them.
    """
    handle, seed = workspace.handle, workspace.settings.seed
    workspace.progress("collecting probes", 0.1)
    prompts, remarks = probes_around_all(handle, plan.requests, MONITOR_SIZES, seed)
    far_tokens = FAR_TOKENS_THOROUGH if workspace.settings.thorough else FAR_TOKENS
    probes = build_probes(handle, plan.requests, prompts, far_tokens=far_tokens, seed=seed)
    return replace(probes, notes=(*probes.notes, *remarks))


def reference_side(workspace: Workspace, probes: ProbeSet, changed: Collection[str]) -> BaseSide:
    """The loaded version's side, from the lowest block on that one of the `changed` parameters can move; its control
    text comes from the cache where it was read before."""
    handle, hooks = workspace.handle, tuple(workspace.kit.monitors)
    return base_side(
        handle,
        probes,
        handle.lowest_layer(changed),
        hooks,
        cache=drift_cache(),
        changed=changed,
        progress=workspace.progress,
    )


def _measure(
    workspace: Workspace, handle: ModelHandle, side: BaseSide, probes: ProbeSet, reference: str
) -> DriftReport:
    kit = workspace.kit
    report = measure_drift(
        handle,
        side,
        probes,
        kit.monitors,
        reference="previous" if reference == "previous" else "base",
        bank=kit.drift_bank,
        bank_model_digest=workspace.store.base().digest,
        seed=workspace.settings.seed,
        progress=workspace.progress,
    )
    broken = [fact for fact, holds in report.integrity.items() if not holds]
    if broken:
        raise IntegrityError(f"the two sides cannot be compared, as this does not hold: {'; '.join(broken)}")
    return report


def _changed_in_lineage(workspace: Workspace, plan: Plan) -> frozenset[str]:
    """Parameters of this plan and of every edit that is live: all others are the base's."""
    return frozenset(workspace.store.live_overrides()) | {change.parameter for change in plan.delta.changes}


@contextmanager
def at_base(workspace: Workspace) -> Iterator[ModelHandle]:
    """The loaded model as the lineage's first version; the live bytes are back afterwards."""
    handle = workspace.handle
    changed = workspace.store.live_overrides()
    kept = saved(handle, changed)
    restore(handle, {name: workspace.tensor(name, "base") for name in changed})
    try:
        yield handle
    finally:
        restore(handle, kept)
