"""Policy owners' words on policy files: which policies a home may be judged by. What replaying the ledger gives.

A policy counts once as many owners have signed its digest as the policy itself and the one accepted before it ask for:
nobody lowers that number alone. A policy stays accepted until an owner withdraws it, which one owner may do alone:
it takes a power away. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from guardedit.records import Digest, Record

POLICY_SIGNED, POLICY_WITHDRAWN = "policy-signed", "policy-withdrawn"
POLICY_STATEMENT = "application/vnd.guardedit.policy+json"


class PolicyStatement(Record):
    """One owner's word on one policy."""

    act: Literal["sign", "withdraw"]
    policy_digest: Digest
    """Of the parsed file: `Policy.digest`."""
    name: str
    """What the policy calls itself; for people."""
    owners: int = Field(ge=1)
    """How many owners the policy asks for from then on."""
    reason: str = ""
    by: str
    """Who was at the keyboard; a name alone."""
    key: str | None = None
    """Id of the policy owner's key that signed this."""
    at: str


@dataclass
class SignedPolicy:
    """What owners said of one policy."""

    name: str
    owners: int
    signers: dict[str, int] = field(default_factory=dict)
    """Id of an owner's key -> number of the entry in which it signed."""
    accepted: int | None = None
    """Number of the entry that was the last one needed."""
    quorum: int = 0
    """How many were needed then."""
    withdrawn: int | None = None


class PolicyWords:
    """All owners' words on policies so far."""

    def __init__(self) -> None:
        self.policies: dict[str, SignedPolicy] = {}
        self.needed = 1
        """How many owners have to agree to what comes next: what the policy accepted last asks for."""

    @property
    def any(self) -> bool:
        """Whether a policy was ever accepted here: from then on no other counts, whatever profile it names."""
        return any(one.accepted is not None for one in self.policies.values())

    def take(self, word: PolicyStatement, key_id: str, seq: int, revoked: frozenset[str]) -> None:
        """One more word, whose signature was checked; those of revoked owners count no more."""
        known = self.policies.get(word.policy_digest)
        if word.act == "withdraw":
            if known is not None:
                known.signers, known.withdrawn = {}, seq
            return
        if known is None:
            known = self.policies[word.policy_digest] = SignedPolicy(word.name, word.owners)
        known.owners = max(known.owners, word.owners)
        known.signers.setdefault(key_id, seq)
        is_open = known.accepted is None or known.withdrawn is not None
        if is_open and len(known.signers.keys() - revoked) >= self.asked(known):
            known.accepted, known.withdrawn, known.quorum = seq, None, self.asked(known)
            self.needed = known.owners

    def asked(self, policy: SignedPolicy) -> int:
        """How many owners have to sign this one."""
        return max(policy.owners, self.needed)

    def problem(self, digest: str, owners: int, revoked: frozenset[str]) -> str | None:
        """Why a policy that asks for `owners` may not be used now, or None. Revoked owners' words count no more."""
        known = self.policies.get(digest)
        if known is None:
            return "no policy owner has signed it"
        if known.withdrawn is not None and not known.signers:
            return "a policy owner has withdrawn it"
        left = len(known.signers.keys() - revoked)
        asked = max(owners, known.quorum if known.accepted is not None else self.asked(known))
        if known.accepted is None or known.withdrawn is not None or left < asked:
            return f"{left} of {asked} policy owners have signed it"
        return None
