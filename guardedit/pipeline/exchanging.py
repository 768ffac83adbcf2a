"""Ledgers that travel: exported from a home, checked without one, imported into an empty one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardedit.audit.chain import require_head
from guardedit.audit.checkpoints import CHECKPOINT, read_checkpoint
from guardedit.audit.exporting import newest_checkpoint, read_files, write_export
from guardedit.audit.importing import Exported, read_export, require_empty, write_import
from guardedit.errors import IntegrityError, NotFoundError
from guardedit.gate.keys import require_signed
from guardedit.gate.replaying import Replayed, replayed
from guardedit.gate.trust import Trust
from guardedit.pipeline.workspace import Workspace
from guardedit.records import digest_of_bytes


def export_ledger(workspace: Workspace, file: Path, blobs: bool) -> dict[str, Any]:
    """Write the ledger to a file, with the newest checkpoint and, with `blobs`, plans and solved updates.

    NotFoundError for an empty ledger, IntegrityError where the record is not what it was.
    """
    head = workspace.ledger.verify()
    if head is None:
        raise NotFoundError(f"the ledger of {workspace.home} is empty; there is nothing to export")
    entries = workspace.ledger.entries()
    replayed(entries)
    files = read_files(workspace.home, entries) if blobs else {}
    write_export(file, workspace.ledger.rows(), newest_checkpoint(workspace.home), files)
    return {**_told(read_export(file)), "file": str(file), "digest": digest_of_bytes(file.read_bytes())}


def import_ledger(workspace: Workspace, file: Path) -> dict[str, Any]:
    """Put an exported ledger into this empty home, once all of it stands.

    BadRequestError for a home that has a record, NotFoundError, IntegrityError naming what does not fit.
    """
    require_empty(workspace.home)
    exported = read_export(file)
    _stands(exported)
    write_import(workspace.home, exported)
    head = workspace.ledger.verify()
    if head != exported.head:
        raise IntegrityError(f"{workspace.home} does not hold what {file} does")
    return {**_told(exported), "home": str(workspace.home)}


def verify_export(
    file: Path, workspace: Workspace | None = None, anchor: Path | None = None
) -> dict[str, Any]:
    """Check an exported ledger: chain, head, keys, signatures, steps, checkpoint, files; with a workspace also that its
    ledger goes on from there, with `anchor` that it holds a checkpoint kept elsewhere.

    IntegrityError, NotFoundError.
    """
    exported = read_export(file)
    record = _stands(exported)
    checked = ["form", "chain", "head", "replay"]
    checked += ["checkpoint"] if exported.checkpoint else []
    checked += ["files"] if exported.files else []
    if anchor is not None:
        made, envelope = read_checkpoint(anchor)
        require_head(exported.entries, made.head, str(anchor))
        _signer(made, envelope, record.trust)
        checked.append("anchor")
    if workspace is not None:
        workspace.ledger.verify(exported.head)
        checked.append("ledger")
    return {
        **_told(exported), "file": str(file), "kind": "ledger", "digest": digest_of_bytes(file.read_bytes()),
        "checked": checked, "key_statements": record.key_statements, "signatures": record.signatures,
        "policy_statements": record.policy_statements,
    }  # fmt: skip


def _stands(exported: Exported) -> Replayed:
    record = replayed(exported.entries)
    if exported.checkpoint is not None:
        _signer(*exported.checkpoint, record.trust)
    return record


def _signer(made: Any, envelope: dict[str, Any] | None, trust: Trust) -> None:
    """IntegrityError for a checkpoint that says it is signed and is not by a key that was ever a runner's."""
    if made.key is None and envelope is None:
        return
    known = trust.keys.get(made.key or "")
    if known is None or "runner" not in known.roles:
        raise IntegrityError(
            f"the checkpoint of entry {made.seq} is signed by a key that is no runner's here"
        )
    require_signed(envelope, made, CHECKPOINT, known.key)


def _told(exported: Exported) -> dict[str, Any]:
    return {
        "entries": len(exported.entries), "head": exported.head.digest, "files": len(exported.files),
        "checkpoint_seq": exported.checkpoint[0].seq if exported.checkpoint else None,
    }  # fmt: skip
