"""Checkpoints of the ledger, signed by the runner's key where there is one, and reviews of emergencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardedit.audit.checkpoints import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from guardedit.audit.index import slip_of
from guardedit.errors import (
    BadRequestError,
    GuardeditError,
    IntegrityError,
    NeedsApprovalError,
    NotFoundError,
)
from guardedit.gate.approvals import require_readable
from guardedit.gate.keys import require_signed
from guardedit.gate.replaying import reviews
from guardedit.gate.signatures import REVIEW
from guardedit.gate.trust import Trust
from guardedit.pipeline.history import History
from guardedit.pipeline.overview import reviews_of
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.signing import signer, trust
from guardedit.records import Decision, canonical


def checkpoint(workspace: History, out: Path | None = None) -> dict[str, Any]:
    """Write the ledger's head to `out`, else into the home's `checkpoints/`; signed where a key is named.

    NotFoundError for an empty ledger, NeedsApprovalError for a key that is not a runner's.
    """
    head = workspace.ledger.verify()
    if head is None:
        raise NotFoundError(f"the ledger of {workspace.home} is empty; there is nothing to keep")
    key = signer(workspace)
    if key is not None:
        trust(workspace).require(key.public.key_id, "runner")
    made = Checkpoint(
        seq=head.seq,
        digest=head.digest,
        at=workspace.now().isoformat(),
        key=key.public.key_id if key else None,
    )
    path = out or workspace.home / "checkpoints" / f"{head.seq:06d}.json"
    write_checkpoint(path, made, key.sign(canonical(made), CHECKPOINT) if key else None)
    return {**made.model_dump(mode="json"), "file": str(path), "signed": key is not None}


def after_commit(workspace: History) -> None:
    """A checkpoint where a runner's key is named; a commit on record never fails for the want of one."""
    try:
        key = signer(workspace)
        if key is not None and trust(workspace).require(key.public.key_id, "runner"):
            checkpoint(workspace)
    except (GuardeditError, OSError) as error:
        workspace.progress(f"no checkpoint was written: {error}", 1.0)


def verify_anchor(workspace: History, file: Path) -> dict[str, Any]:
    """Check that the ledger still holds what a checkpoint names, and who signed that. IntegrityError, NotFoundError."""
    made, envelope = read_checkpoint(file)
    workspace.ledger.verify(made.head)
    name = None
    if made.key is not None or envelope is not None:
        try:
            known = trust(workspace).require(made.key, "runner")
        except NeedsApprovalError as error:
            raise IntegrityError(f"{file} is signed, but {error}") from error
        require_signed(envelope, made, CHECKPOINT, known.key)
        name = known.name
    return {"anchor_seq": made.seq, "anchor_signed_by": name or "nobody"}


def open_reviews(workspace: History) -> list[dict[str, Any]]:
    """Emergency words that nobody has looked at again, oldest first. IntegrityError for a review that was forged."""
    entries = workspace.ledger.entries()
    return reviews_of(map(slip_of, entries), reviews(entries, Trust(entries)), workspace.now())


def review(workspace: History, plan_id: str, note: str) -> dict[str, Any]:
    """Close the review of a plan's emergency, signed by a reviewer's or auditor's key of somebody else.

    BadRequestError, NotFoundError where none is open, NeedsApprovalError for a key that does not count.
    """
    if not note.strip():
        raise BadRequestError("reviewed: a note is needed")
    require_readable("reviewed", note)
    key = signer(workspace)
    if key is None:
        raise NeedsApprovalError("a review is signed: name a reviewer's or auditor's key with --key")
    with editing(workspace):
        waiting = [row for row in open_reviews(workspace) if row["plan_id"] == plan_id]
        if not waiting:
            raise NotFoundError(f"no review of {plan_id!r} is open; `guardedit status` lists them")
        word = _decision(workspace, waiting[0]["seq"])
        name = _reviewer(workspace, key.public.key_id, word)
        body = {"plan_id": plan_id, "edit_id": plan_id, "of": waiting[0]["seq"], "by": name,
                "key": key.public.key_id, "note": note.strip(), "at": workspace.now().isoformat()}  # fmt: skip
        workspace.ledger.append("reviewed", {**body, "envelope": key.sign(canonical(body), REVIEW)})
    return body


def _decision(workspace: History, seq: int) -> Decision:
    (entry,) = [e for e in workspace.ledger.entries("decided") if e.seq == seq]
    return Decision.model_validate(entry.body["decision"])


def _reviewer(workspace: History, key_id: str, word: Decision) -> str:
    known = trust(workspace)
    found = known.keys.get(key_id)
    if found is None or not (found.has("reviewer") or found.has("auditor")):
        known.require(key_id, "reviewer")
    if key_id == word.key:
        raise NeedsApprovalError(f"key {word.approver} broke the glass; somebody else has to look at it")
    return known.keys[key_id].name
