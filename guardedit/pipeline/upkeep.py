"""Looking after a home: what stands where, whether the bytes are right, and putting right what a crash left."""

from __future__ import annotations

from typing import Any

from guardedit.audit.ledger import Entry
from guardedit.config import Settings
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.workspace import Workspace


def status(workspace: Workspace) -> dict[str, Any]:
    """What is live and where every plan stands; reads ledger and version records, no model."""
    plans = [_line(workspace, entry) for entry in workspace.ledger.entries("planned")]
    live = workspace.store.lineage() if workspace.store.exists else None
    return {
        "home": str(workspace.home),
        "model": workspace.store.base().name if live else workspace.settings.model,
        "digest": live.digest if live else None,
        "base_digest": workspace.store.base().digest if live else None,
        "version": live.version if live else None,
        "plans": plans,
    }


def _line(workspace: Workspace, entry: Entry) -> dict[str, Any]:
    body, request = entry.body, entry.body["requests"][0]
    return {
        "plan_id": body["plan_id"],
        "state": workspace.state(body["plan_id"]),
        "editor": body["editor"],
        "edit": f"{request['subject']}: {request['target_true']} -> {request['target_new']}",
        "at": entry.at,
        "plan_digest": body["plan_digest"],
    }


def verify(workspace: Workspace) -> dict[str, Any]:
    """Recompute the digests of ledger, versions, plans, deltas and the model's kit from their bytes.

    Raises IntegrityError at the first that is not what was recorded, naming it.
    """
    head = workspace.ledger.verify()
    plans = workspace.ledger.entries("planned")
    for entry in plans:
        plan = workspace.read_plan(entry.body["plan_id"])
        workspace.read_delta(plan)
    checked = workspace.store.verify() if workspace.store.exists else None
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


def recover(workspace: Workspace) -> dict[str, Any]:
    """Finish or drop what a crash left; doing it twice changes nothing more.

    A commit on record is finished; a staged copy nobody waits for is dropped; an undo that reached the versions but not
    the ledger is put on record.
    """
    with workspace.store.lock():
        ids = [entry.body["plan_id"] for entry in workspace.ledger.entries("planned")]
        states = {plan_id: workspace.state(plan_id) for plan_id in ids}
        wanted = frozenset(plan_id for plan_id, state in states.items() if state in ("held", "committed"))
        done = workspace.store.recover(wanted)
        finished = [plan_id for plan_id in done.staged if states.get(plan_id) == "committed"]
        for plan_id in finished:
            workspace.store.commit(plan_id)
        dropped = [plan_id for plan_id, state in states.items() if state == "staged"]
        for plan_id in dropped:
            _record(workspace, plan_id, "the process ended before the monitor had finished")
        undone = _unrecorded_undos(workspace, states)
        for plan_id in undone:
            _record(workspace, plan_id, "the undo had reached the versions, not the ledger", undone=True)
    return {"finished": finished, "dropped": dropped, "undone": undone, "removed": list(done.dropped)}


def _unrecorded_undos(workspace: Workspace, states: dict[str, Any]) -> list[str]:
    if not workspace.store.exists:
        return []
    lineage = workspace.store.lineage()
    return [plan_id for plan_id, state in states.items() if state == "committed" and lineage.undone(plan_id)]


def _record(workspace: Workspace, plan_id: str, reason: str, undone: bool = False) -> None:
    body = {"event": "roll-back", "plan_id": plan_id, "edit_id": plan_id, "reason": reason, "undone": undone}
    workspace.ledger.append("rolled-back", body)


def load_live(workspace: Workspace) -> ModelHandle:
    """The live model of the workspace's home, whatever model that is."""
    base = workspace.store.base()
    known = Settings(model=base.name, home=workspace.home)
    return Workspace(known).handle
