"""Whose keys count: what replaying the ledger's entries gives, never a file that somebody could edit. No torch.

The first keys are trusted on somebody's word. As soon as a policy owner's key is trusted, every further entry about
keys needs a policy owner's signature; an entry without one is an integrity failure. A revoked key stays revoked, so
that an old entry that is played again trusts nobody. Where the accepted policy says `policy_owners = 2`, a key is
trusted once that many owners have said so; one owner's word revokes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from pydantic import ValidationError

from guardedit.errors import BadRequestError, IntegrityError, NeedsApprovalError, NotFoundError
from guardedit.gate.keys import PublicKey, parse_public, require_signed
from guardedit.gate.policy_words import (
    POLICY_SIGNED,
    POLICY_STATEMENT,
    POLICY_WITHDRAWN,
    PolicyStatement,
    PolicyWords,
)
from guardedit.records import Record

Role = Literal["reviewer", "proposer", "runner", "break-glass", "policy-owner", "auditor"]
ROLES: tuple[Role, ...] = get_args(Role)
TRUSTED, REVOKED = "key-trusted", "key-revoked"
STATEMENT = "application/vnd.guardedit.key+json"


_REFUSALS = (BadRequestError, NotFoundError, NeedsApprovalError)


class Entered(Protocol):
    """What is needed of a ledger entry."""

    @property
    def seq(self) -> int:
        """Its number."""

    @property
    def kind(self) -> str:
        """What happened."""

    @property
    def body(self) -> dict[str, Any]:
        """The particulars."""


class KeyStatement(Record):
    """One word about one key."""

    act: Literal["trust", "revoke"]
    key_id: str
    name: str
    role: Role | None = None
    public: str | None = None
    """PEM, where the key is trusted."""
    reason: str = ""
    by: str
    """Who was at the keyboard; a name alone."""
    key: str | None = None
    """Id of the policy owner's key that signed this."""
    at: str


@dataclass(frozen=True)
class TrustedKey:
    """A key as the ledger has it at one point."""

    key: PublicKey
    name: str
    roles: dict[Role, int] = field(default_factory=dict)
    """Role -> number of the entry that gave it."""
    revoked: int | None = None
    reason: str = ""

    def has(self, role: Role, seq: int | None = None) -> bool:
        """Whether the key had the role when entry `seq` was written (None: now), and is not revoked today."""
        given = self.roles.get(role)
        return self.revoked is None and given is not None and (seq is None or given < seq)

    def had(self, role: Role, seq: int) -> bool:
        """Whether the key had the role when entry `seq` was written, whatever became of it since."""
        given = self.roles.get(role)
        return given is not None and given < seq and (self.revoked is None or seq < self.revoked)


class Trust:
    """The trusted set, built entry by entry."""

    def __init__(self, entries: Iterable[Entered] = ()) -> None:
        self.keys: dict[str, TrustedKey] = {}
        self.policies = PolicyWords()
        self._waiting: dict[tuple[str, str, Role | None], dict[str, int]] = {}
        """What too few owners have said so far: (key, name, role) -> owner's key -> entry."""
        for entry in entries:
            if entry.kind in (TRUSTED, REVOKED):
                self._take(entry)
            elif entry.kind in (POLICY_SIGNED, POLICY_WITHDRAWN):
                self._take_policy(entry)

    @property
    def owned(self) -> bool:
        """Whether a policy owner was ever named: from then on words about keys are signed."""
        return any("policy-owner" in known.roles for known in self.keys.values())

    @property
    def revoked(self) -> frozenset[str]:
        """Ids of the keys that are trusted no longer."""
        return frozenset(key_id for key_id, known in self.keys.items() if known.revoked is not None)

    def waiting(self, word: KeyStatement) -> int:
        """How many more owners have to say the same until it holds; 0 where it holds."""
        said = self._waiting.get((word.key_id, word.name, word.role), {})
        return self.policies.needed - len(said.keys() - self.revoked) if said else 0

    def require(self, key_id: str | None, role: Role, seq: int | None = None) -> TrustedKey:
        """The trusted key of that id with that role. NeedsApprovalError says what is wrong with it."""
        known = self.keys.get(key_id or "")
        if known is None:
            raise NeedsApprovalError(
                f"key {(key_id or 'none')[:12]} is not trusted; see `guardedit keys list`"
            )
        if known.revoked is not None:
            raise NeedsApprovalError(f"key {known.name} was revoked: {known.reason}")
        if role not in known.roles:
            raise NeedsApprovalError(f"key {known.name} is {', '.join(known.roles)}, not {role}")
        if not known.has(role, seq):
            raise NeedsApprovalError(f"key {known.name} was not yet trusted as {role} when it signed")
        return known

    def check(self, word: KeyStatement) -> None:
        """Whether a word about a key can be put on record. BadRequestError, NotFoundError."""
        known = self.keys.get(word.key_id)
        if word.act == "revoke" and known is None:
            raise NotFoundError(f"no trusted key {word.name!r}; see `guardedit keys list`")
        if known is not None and known.revoked is not None:
            raise BadRequestError(f"key {known.name} was revoked for good: {known.reason}; make a new key")
        taken = [k.name for k in self.keys.values() if k.name == word.name and k.key.key_id != word.key_id]
        if word.act == "trust" and taken:
            raise BadRequestError(f"the name {word.name!r} belongs to another key; give one with --name")

    def named(self, name: str) -> TrustedKey:
        """A trusted key by name or id. NotFoundError."""
        for known in self.keys.values():
            if name in (known.name, known.key.key_id):
                return known
        raise NotFoundError(f"no trusted key {name!r}; there are {', '.join(self.names()) or 'none'}")

    def names(self) -> list[str]:
        """Names of all keys that were ever trusted."""
        return [known.name for known in self.keys.values()]

    def _take(self, entry: Entered) -> None:
        try:
            word = KeyStatement.model_validate(entry.body["statement"])
            self._authorised(word, entry)
            self.check(word)
        except (KeyError, TypeError, ValidationError, IntegrityError, *_REFUSALS) as error:
            raise IntegrityError(f"ledger entry {entry.seq} about a key cannot stand: {error}") from error
        if word.act == "revoke":
            old = self.keys[word.key_id]
            self.keys[word.key_id] = TrustedKey(old.key, old.name, old.roles, entry.seq, word.reason)
        elif self._agreed(word, entry.seq):
            self._trusted(word, entry.seq)

    def _agreed(self, word: KeyStatement, seq: int) -> bool:
        """Whether enough owners have said this; where there is none, anybody's word is enough."""
        if not self.owned or self.policies.needed == 1:
            return True
        what = (word.key_id, word.name, word.role)
        said = self._waiting.setdefault(what, {})
        said.setdefault(word.key or "", seq)
        if len(said.keys() - self.revoked) < self.policies.needed:
            return False
        del self._waiting[what]
        return True

    def _take_policy(self, entry: Entered) -> None:
        try:
            word = PolicyStatement.model_validate(entry.body["statement"])
            if (entry.kind == POLICY_WITHDRAWN) != (word.act == "withdraw"):
                raise IntegrityError(f"the entry is {entry.kind}, its statement says {word.act}")
            owner = self.require(word.key, "policy-owner", entry.seq)
            require_signed(entry.body.get("envelope"), word, POLICY_STATEMENT, owner.key)
        except (KeyError, TypeError, ValidationError, NeedsApprovalError, IntegrityError) as error:
            raise IntegrityError(f"ledger entry {entry.seq} about a policy cannot stand: {error}") from error
        self.policies.take(word, owner.key.key_id, entry.seq, self.revoked)

    def _trusted(self, word: KeyStatement, seq: int) -> None:
        try:
            key = parse_public((word.public or "").encode(), f"key {word.name}")
        except BadRequestError as error:
            raise IntegrityError(f"ledger entry {seq} trusts what is no key: {error}") from error
        if key.key_id != word.key_id or word.role is None:
            raise IntegrityError(f"ledger entry {seq}: the key is {key.key_id[:12]}, not {word.key_id[:12]}")
        old = self.keys.get(key.key_id)
        roles = {word.role: seq, **(old.roles if old else {})}
        self.keys[key.key_id] = TrustedKey(key, old.name if old else word.name, roles)

    def _authorised(self, word: KeyStatement, entry: Entered) -> None:
        if (entry.kind == REVOKED) != (word.act == "revoke"):
            raise IntegrityError(f"ledger entry {entry.seq} says {entry.kind}, its statement {word.act}")
        if self.owned:
            owner = self.require(word.key, "policy-owner", entry.seq)
            require_signed(entry.body.get("envelope"), word, STATEMENT, owner.key)
