"""Looking after a home: what stands where, and whether the bytes are right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardedit.audit.version_reading import Verified
from guardedit.audit.versions import VersionStore
from guardedit.config import Settings
from guardedit.errors import IntegrityError
from guardedit.gate.replaying import replayed
from guardedit.pipeline.history import History
from guardedit.pipeline.overview import overview
from guardedit.pipeline.recovery import disagreement

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle
    from guardedit.pipeline.workspace import Workspace


def status(workspace: History) -> dict[str, Any]:
    """What is live and where every plan stands; see `overview`."""
    return overview(workspace.home, workspace.settings.model)


def verify(workspace: Workspace) -> dict[str, Any]:
    """Recompute the digests of ledger, versions, staged copies, plans, deltas and the model's kit from their bytes,
    play the record again (keys, policies, signatures, steps), and compare what the ledger says with what
    the versions are.

    Raises IntegrityError at the first that is not what was recorded, naming it.
    """
    head = workspace.ledger.verify()
    record = replayed(workspace.ledger.entries())
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
        "key_statements": record.key_statements,
        "policy_statements": record.policy_statements,
        "signatures": record.signatures,
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
