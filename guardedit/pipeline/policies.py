"""Policy owners at work: sign a policy file, withdraw one, and refuse a policy that they have not agreed to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError, NeedsApprovalError, NotFoundError, PolicyError
from guardedit.gate.approvals import require_readable
from guardedit.gate.keys import PrivateKey
from guardedit.gate.policy_words import POLICY_SIGNED, POLICY_STATEMENT, POLICY_WITHDRAWN, PolicyStatement
from guardedit.gate.trust import Trust
from guardedit.pipeline.history import History
from guardedit.pipeline.kit import full_name, kit_folder
from guardedit.pipeline.levels import LEVELS, policy_file, policy_of
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.signing import signer, trust
from guardedit.records import canonical


def sign_policy(workspace: History, file: Path | None) -> dict[str, Any]:
    """Put a policy owner's signature under a policy's digest on record.

    `file` is a file or a level; without one the model's standard level is meant.

    PolicyError for a file that is none, NeedsApprovalError without a policy owner's key, BadRequestError where that key
    has signed it already.
    """
    policy = policy_of(_file(workspace.settings.model, file))
    key = _owner(workspace)
    word = PolicyStatement(
        act="sign", policy_digest=policy.digest, name=policy.name, owners=policy.policy_owners,
        by=workspace.user, key=key.public.key_id, at=workspace.now().isoformat(),
    )  # fmt: skip
    with editing(workspace):
        known = trust(workspace)
        said = known.policies.policies.get(policy.digest)
        if said is not None and key.public.key_id in said.signers:
            raise BadRequestError(
                f"{policy.name} ({policy.digest[:19]}…) carries this key's signature already"
            )
        _append(workspace, word, key, POLICY_SIGNED)
    return _row(trust(workspace), policy.digest)


def shown_policy(model: str, named: Path | None) -> str:
    """The text of a policy file or of one of the model's levels, as it would be judged by. Raises PolicyError."""
    path = _file(model, named)
    policy_of(path)
    return path.read_text("utf-8")


def levels_of(model: str) -> list[dict[str, Any]]:
    """The levels that the model's kit ships: name, digest and number of rules."""
    found = []
    for level in LEVELS:
        try:
            path = _file(model, Path(level))
        except PolicyError:
            continue
        policy = policy_of(path)
        found.append(
            {"level": level, "name": policy.name, "digest": policy.digest, "rules": len(policy.rules)}
        )
    return found


def _file(model: str, named: Path | None) -> Path:
    return policy_file(kit_folder(full_name(model)), named, model)


def withdraw_policy(workspace: History, digest: str, reason: str) -> dict[str, Any]:
    """Take all owners' words on a policy back. NotFoundError for a digest that nobody signed; else as `sign_policy`."""
    if not reason.strip():
        raise BadRequestError("withdraw: a reason is needed")
    require_readable("withdraw", reason)
    key = _owner(workspace)
    with editing(workspace):
        known = trust(workspace)
        found = _named(known, digest)
        word = PolicyStatement(
            act="withdraw", policy_digest=found, name=known.policies.policies[found].name,
            owners=known.policies.policies[found].owners, reason=reason.strip(),
            by=workspace.user, key=key.public.key_id, at=workspace.now().isoformat(),
        )  # fmt: skip
        _append(workspace, word, key, POLICY_WITHDRAWN)
    return _row(trust(workspace), found)


def _named(known: Trust, digest: str) -> str:
    """The one signed policy whose digest starts so, with or without "sha256:"."""
    start = digest.removeprefix("sha256:")
    found = [
        one for one in known.policies.policies if start and one.removeprefix("sha256:").startswith(start)
    ]
    if len(found) != 1:
        raise NotFoundError(
            f"{len(found)} signed policies have a digest {digest[:80]!r}; see `guardedit policy list`"
        )
    return found[0]


def _owner(workspace: History) -> PrivateKey:
    key = signer(workspace)
    if key is None:
        raise NeedsApprovalError("a policy is signed: name a policy owner's key with --key")
    trust(workspace).require(key.public.key_id, "policy-owner")
    return key


def _append(workspace: History, word: PolicyStatement, key: PrivateKey, kind: str) -> None:
    envelope = key.sign(canonical(word), POLICY_STATEMENT)
    workspace.ledger.append(kind, {"statement": word.model_dump(mode="json"), "envelope": envelope})


def listed_policies(workspace: History) -> list[dict[str, Any]]:
    """Every policy that an owner has signed, oldest first."""
    known = trust(workspace)
    return [_row(known, digest) for digest in known.policies.policies]


def _row(known: Trust, digest: str) -> dict[str, Any]:
    said = known.policies.policies[digest]
    problem = known.policies.problem(digest, said.owners, known.revoked)
    signers = [known.keys[key_id].name for key_id in said.signers if key_id not in known.revoked]
    return {
        "name": said.name, "policy_digest": digest, "owners": said.owners, "signed_by": signers,
        "counts": problem is None, "problem": problem,
    }  # fmt: skip
