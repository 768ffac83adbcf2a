"""Keys at work: who signs in this session, and whose keys the home trusts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardedit.config import keys_folder, named_key
from guardedit.errors import BadRequestError, NeedsApprovalError
from guardedit.gate import keys
from guardedit.gate.approvals import require_readable
from guardedit.gate.signatures import PROPOSAL, Proposal, Signed
from guardedit.gate.trust import REVOKED, STATEMENT, TRUSTED, KeyStatement, Role, Trust
from guardedit.pipeline.history import History
from guardedit.pipeline.recovery import editing
from guardedit.records import canonical


def folder_of(workspace: History) -> Path:
    """Where this user's private keys lie. BadRequestError for a folder inside the home, which others may read."""
    folder = workspace.settings.keys or keys_folder()
    if folder.resolve().is_relative_to(workspace.home.resolve()):
        raise BadRequestError(
            f"{folder} lies in the home; private keys belong elsewhere (--keys, $GUARDEDIT_KEYS)"
        )
    return folder


def signer(workspace: History) -> keys.PrivateKey | None:
    """The key that was asked for, or None; raises NotFoundError or BadRequestError where it cannot be used."""
    name = workspace.settings.key or named_key()
    return keys.load_key(folder_of(workspace), name, workspace.ask) if name else None


def trust(workspace: History) -> Trust:
    """The keys that the ledger trusts. IntegrityError where an entry about keys cannot stand."""
    return Trust(workspace.ledger.entries())


def trust_key(workspace: History, file: Path, role: Role, name: str | None = None) -> KeyStatement:
    """Trust a public key's file in a role. BadRequestError, NeedsApprovalError without a policy owner's key."""
    public = keys.read_public(file)
    word = KeyStatement(
        act="trust", key_id=public.key_id, name=name or file.stem, role=role, public=public.public,
        by=workspace.user, at=workspace.now().isoformat(),
    )  # fmt: skip
    return _record(workspace, word, TRUSTED)


def revoke_key(workspace: History, name: str, reason: str) -> KeyStatement:
    """Trust a key no longer, for good; what it signed and nobody has applied counts no more. Raises as `trust_key`."""
    if not reason.strip():
        raise BadRequestError("revoke: a reason is needed")
    require_readable("revoke", reason)
    known = trust(workspace).named(name)
    word = KeyStatement(
        act="revoke", key_id=known.key.key_id, name=known.name, reason=reason.strip(),
        by=workspace.user, at=workspace.now().isoformat(),
    )  # fmt: skip
    return _record(workspace, word, REVOKED)


def _record(workspace: History, word: KeyStatement, kind: str) -> KeyStatement:
    key = signer(workspace)
    with editing(workspace):
        known = trust(workspace)
        word = word.model_copy(update={"key": key.public.key_id if key else None})
        known.check(word)
        if known.owned:
            _require_owner(known, word)
        envelope = key.sign(canonical(word), STATEMENT) if key else None
        workspace.ledger.append(kind, {"statement": word.model_dump(mode="json"), "envelope": envelope})
    return word


def missing_owners(workspace: History, word: KeyStatement) -> int:
    """How many more policy owners have to say the same until it holds."""
    return trust(workspace).waiting(word)


def _require_owner(known: Trust, word: KeyStatement) -> None:
    try:
        known.require(word.key, "policy-owner")
    except NeedsApprovalError as error:
        raise NeedsApprovalError(
            f"keys of this home are a policy owner's to name (--key): {error}"
        ) from error


def proposal(workspace: History, plan_digest: str) -> dict[str, Any]:
    """The author's signature for the plan's entry, where a key was named. NeedsApprovalError where
    the key that was named has not the role; a key from the environment just does not sign."""
    key = signer(workspace)
    if key is None or (workspace.settings.key is None and not _may(workspace, key, "proposer")):
        return {}
    trust(workspace).require(key.public.key_id, "proposer")
    made = Proposal(
        plan_digest=plan_digest, author=workspace.user, key=key.public.key_id, at=workspace.now().isoformat()
    )
    envelope: Signed = key.sign(canonical(made), PROPOSAL)
    return {"proposal": {"statement": made.model_dump(mode="json"), "envelope": envelope}}


def _may(workspace: History, key: keys.PrivateKey, role: Role) -> bool:
    known = trust(workspace).keys.get(key.public.key_id)
    return known is not None and known.has(role)


def listed(workspace: History) -> dict[str, Any]:
    """Trusted and revoked keys of the home, and the private keys of this user."""
    rows = [
        {"name": k.name, "key_id": k.key.key_id, "roles": list(k.roles), "revoked": k.revoked is not None,
         "reason": k.reason}
        for k in trust(workspace).keys.values()
    ]  # fmt: skip
    folder = folder_of(workspace)
    own = {name: key.key_id for name, key in keys.names(folder).items()} if folder.is_dir() else {}
    return {"trusted": rows, "own": own, "folder": str(folder)}
