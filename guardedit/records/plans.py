"""What is judged and decided: findings, plans, words on them."""

from __future__ import annotations

from typing import ClassVar, Literal

from guardedit.records.base import Digest, Grown, Level, Outcome, Record, Verdict, digest_of
from guardedit.records.deltas import DeltaRecord
from guardedit.records.measured import RiskReport
from guardedit.records.requests import EditRequest


class Waiver(Record):
    """A person lifts a soft finding, on record."""

    metric: str
    author: str
    reason: str
    expires: str
    """ISO 8601, UTC."""


class Finding(Record):
    """One score against one limit."""

    rule: str
    metric: str
    stage: Literal["preop", "postop"]
    value: float | None
    op: Literal["<=", ">=", "==", "<", ">"]
    limit: float
    level: Level
    verdict: Verdict
    sentence: str
    """In plain words, for someone who has never heard of the metric."""
    waiver: Waiver | None = None


class Judgement(Record):
    """All findings of one stage and what follows from them."""

    findings: tuple[Finding, ...]
    outcome: Outcome
    verdict: Verdict
    reason: str
    policy_digest: Digest


class Screened(Record):
    """What the policy said of one of many requests from its key alone, before anything was solved."""

    subject: str
    prompt: str
    """With its subject in place."""
    target_new: str
    stopped: bool
    reason: str
    """What decided, in plain words."""
    scores: dict[str, float | None] = {}
    """Key scores by name; None where one could not be measured."""
    findings: tuple[Finding, ...] = ()
    """Findings that do not pass or were waived."""


class RequestOutcome(Record):
    """What became of one request of a joint plan on the staged copy. P is that of the whole target."""

    p_new_before: float
    p_new_after: float
    p_old_before: float | None = None
    p_old_after: float | None = None
    holds: bool
    """Per token, the new target is more likely than the old one, as efficacy counts it."""


class Plan(Grown):
    """A solved, measured and judged edit. An approval names the digest of this record's bytes."""

    later: ClassVar[frozenset[str]] = frozenset({"alternative"})

    plan_id: str
    created: str
    author: str
    requests: tuple[EditRequest, ...]
    """What was solved together; where `delta` changes nothing, what would have been."""
    stopped: tuple[EditRequest, ...] = ()
    """Requests left out of a joint solve because the policy stops them."""
    screened: tuple[Screened, ...] = ()
    """A row for each of many requests, in the order in which they were asked for."""
    editor: str
    model_name: str
    model_digest: Digest
    base_digest: Digest
    """Digest of the lineage's first version."""
    delta: DeltaRecord
    risk: RiskReport
    judgement: Judgement
    waivers: tuple[Waiver, ...] = ()
    policy_digest: Digest
    seed: int
    versions: dict[str, str]
    """guardedit, torch, transformers, Python."""
    alternative: tuple[EditRequest, ...] = ()
    """The requests in the form that the policy asks for instead, where a broken limit does."""

    @property
    def digest(self) -> str:
        """What an approval signs."""
        return digest_of(self)

    @property
    def is_joint(self) -> bool:
        """Whether more than one request was asked for."""
        return len(self.requests) + len(self.stopped) > 1

    @property
    def plans(self) -> Literal["one", "many"]:
        """Which of a policy's rules the solved edit is judged by."""
        return "many" if len(self.requests) > 1 else "one"


class Decision(Grown):
    """Somebody's word on one plan, bound to its digest."""

    later: ClassVar[frozenset[str]] = frozenset({"key", "own", "ticket", "hours", "review_due"})

    plan_digest: Digest
    outcome: Literal["approved", "rejected", "auto-approved"]
    approver: str
    reason: str
    at: str
    drift_digest: Digest | None = None
    """Set when a held edit is decided: the monitor's report this word is about."""
    key: str | None = None
    """Id of the key that signed this word; None: a name that nobody checked."""
    own: bool = False
    """The plan's author decided on it alone."""
    ticket: str | None = None
    """Set in an emergency: what it is filed under."""
    hours: float | None = None
    """Set in an emergency: how long the word may be used."""
    review_due: str | None = None
    """Set in an emergency: until when somebody has to look at it again."""
