"""Looking after a home: what stands where, and whether the bytes are right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardedit.audit.ledger import Entry
from guardedit.audit.version_reading import Verified
from guardedit.audit.versions import VersionStore
from guardedit.config import Settings
from guardedit.errors import IntegrityError
from guardedit.gate.states import State
from guardedit.pipeline.anchoring import open_reviews
from guardedit.pipeline.history import History
from guardedit.pipeline.recovery import disagreement

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle
    from guardedit.pipeline.workspace import Workspace


def status(workspace: History) -> dict[str, Any]:
    """What is live and where every plan stands; reads ledger and version records, no model."""
    states = workspace.states()
    plans = [_line(entry, states) for entry in workspace.ledger.entries("planned")]
    live = workspace.store.lineage() if workspace.store.exists else None
    return {
        "home": str(workspace.home),
        "model": workspace.store.base().name if live else workspace.settings.model,
        "digest": live.digest if live else None,
        "base_digest": workspace.store.base().digest if live else None,
        "version": live.version if live else None,
        "plans": plans,
        "reviews": open_reviews(workspace),
    }


def _line(entry: Entry, states: Mapping[str, State]) -> dict[str, Any]:
    body = entry.body
    return {
        "plan_id": body["plan_id"],
        "state": states[body["plan_id"]],
        "editor": body["editor"],
        "edit": _edit(body["requests"], body.get("stopped", [])),
        "at": entry.at,
        "plan_digest": body["plan_digest"],
    }


def _edit(requests: list[dict[str, Any]], stopped: list[dict[str, Any]]) -> str:
    """What a plan is about, on one line."""
    if len(requests) == 1 and not stopped:
        one = requests[0]
        return f"{one['subject']}: {one['target_true']} -> {one['target_new']}"
    first = [one["subject"] for one in requests[:3]]
    more = ", …" if len(requests) > len(first) else ""
    left_out = f"; {len(stopped)} stopped" if stopped else ""
    return f"{len(requests)} facts{': ' if first else ''}{', '.join(first)}{more}{left_out}"


def verify(workspace: Workspace) -> dict[str, Any]:
    """Recompute the digests of ledger, versions, staged copies, plans, deltas and the model's kit from their bytes, and
    compare what the ledger says with what the versions are.

    Raises IntegrityError at the first that is not what was recorded, naming it.
    """
    head = workspace.ledger.verify()
    plans = workspace.ledger.entries("planned")
    for entry in plans:
        plan = workspace.read_plan(entry.body["plan_id"])
        workspace.read_delta(plan)
    checked = _versions(workspace) if plans or workspace.store.exists else None
    kit = workspace.kit if plans else None
    return {
        "ledger_entries": head.seq if head else 0,
        "ledger_head": head.digest if head else None,
        "plans": len(plans),
        "versions": checked.n_versions if checked else 0,
        "digest": checked.digest if checked else None,
        "bytes_hashed": checked.n_bytes if checked else 0,
        "kit_files": len(kit.digests) if kit else 0,
    }


def _versions(workspace: Workspace) -> Verified:
    """Versions and staged copies, and whether ledger and versions tell the same story."""
    checked = workspace.store.verify()
    for edit_id in workspace.store.staged_ids():
        workspace.store.staged(edit_id)
    problem = disagreement(workspace)
    if problem is not None:
        raise IntegrityError(f"{problem}; `guardedit recover` puts right what a crash left")
    return checked


def guarded_model(home: Path) -> str | None:
    """Name of the model that a home guards, or None; nothing is made."""
    store = VersionStore(home)
    return store.base().name if store.exists else None


def load_live(workspace: Workspace) -> ModelHandle:
    """The live model of the workspace's home, whatever model that is."""
    from guardedit.pipeline.workspace import Workspace

    base = workspace.store.base()
    known = Settings(model=base.name, home=workspace.home)
    return Workspace(known).handle
