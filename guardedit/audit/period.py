"""What an audit of a period holds: one record, drawn from the ledger, the plans and the versions alone.

`PeriodAudit.evidence` is the same, byte for byte, whenever and wherever it is drawn from the same ledger; what differs
between two runs (clock, host, software) stands in `envelope`.
"""

from __future__ import annotations

from typing import Literal

from guardedit.records import Digest, EditRequest, Record, Verdict, digest_of

IncidentKind = Literal[
    "rolled-back-by-monitor", "monitor-unfinished", "commit-failed", "held", "held-edit-rejected", "blocked",
    "recovered", "stale", "undone-on-request",
]  # fmt: skip
OpenKind = Literal["waits-for-a-person", "approved-not-applied", "held", "staged"]


class Word(Record):
    """A decision as the ledger has it."""

    seq: int
    """The ledger's entry."""
    outcome: str
    approver: str
    reason: str
    at: str
    plan_digest: Digest
    drift_digest: Digest | None = None
    """Set when it is about a held edit."""
    key: str | None = None
    """Id of the key that signed it; None: a name that nobody checked."""
    own: bool = False
    """The plan's author decided on it alone, by key where there is one."""
    ticket: str | None = None
    """Of an approval in an emergency (break-glass)."""


class Judged(Record):
    """What the policy said at one stage."""

    verdict: Verdict
    outcome: str
    reason: str
    kept: int
    """How many limits were kept,"""
    limits: int
    """of how many."""


class EditLine(Record):
    """One edit, as it stands at the end of the period."""

    plan_id: str
    state: str
    editor: str
    requests: tuple[EditRequest, ...]
    stopped: tuple[EditRequest, ...] = ()
    """Left out of a joint plan by the policy."""
    proposer: str
    planned: str
    """When; the ledger's word."""
    decisions: tuple[Word, ...]
    preop: Judged
    postop: Judged | None = None
    plan_digest: Digest
    policy_digest: Digest
    delta_digest: Digest
    digest_before: Digest
    """Of the model that it was planned on."""
    digest_staged: Digest | None = None
    entries: tuple[int, ...]
    """Its entries in the ledger, up to the end of the period."""


class OpenItem(Record):
    """What waits for somebody at the end of the period."""

    plan_id: str
    kind: OpenKind
    since: str
    reason: str


class Waived(Record):
    """A waiver in a plan, and whether a broken limit was lifted by it."""

    plan_id: str
    metric: str
    author: str
    reason: str
    expires: str
    lifted: bool


class Override(Record):
    """A person let go ahead what the policy had not let pass."""

    plan_id: str
    seq: int
    approver: str
    own_plan: bool
    """The approver is who proposed it."""
    reason: str
    stage: Literal["preop", "postop"]
    broken: tuple[str, ...]
    """Metrics of binding limits that were not kept, or could not be judged, and that nobody waived."""


class Incident(Record):
    """Something that did not go the plain way from plan to commit."""

    seq: int
    at: str
    plan_id: str
    kind: IncidentKind
    by: str | None = None
    reason: str


class LineageDrift(Record):
    """One of the policy's limits on the sum of all edits, at one edit's monitoring."""

    seq: int
    plan_id: str
    rule: str
    metric: str
    value: float | None
    op: str
    limit: float
    level: str
    verdict: Verdict


class VersionLine(Record):
    """One version of the lineage."""

    generation: int
    name: str
    action: Literal["edit", "roll-back"]
    edit_id: str
    record: Digest
    digest: Digest
    """Of the model."""


class LiveFact(Record):
    """A fact of the live model that was edited."""

    plan_id: str
    editor: str
    request: EditRequest
    p_new_before: float | None = None
    p_new_after: float | None = None
    effects: tuple[tuple[str, float | None, str], ...] = ()
    """Name, value and unit of what the monitor measured on everything else; of the whole plan."""


class Chain(Record):
    """Where the ledger stood."""

    head_seq: int
    head_digest: Digest | None
    """Of the last entry when the audit was drawn; None of an empty ledger."""
    first: int | None
    """First and last entry of the period,"""
    last: int | None
    opening: Digest | None
    """digest of the entry before the first,"""
    closing: Digest | None
    """and of the last: the next period's opening."""
    untracked: int
    """Entries of the period that say that MLflow was away."""


class Evidence(Record):
    """All that is drawn from the home."""

    since: str | None
    until: str | None
    model: str
    base_digest: Digest | None
    live_digest: Digest | None
    """When the audit was drawn."""
    live_version: str | None
    chain: Chain
    edits: tuple[EditLine, ...]
    """Those with an entry in the period."""
    open: tuple[OpenItem, ...]
    waivers: tuple[Waived, ...]
    overrides: tuple[Override, ...]
    incidents: tuple[Incident, ...]
    drift: tuple[LineageDrift, ...]
    """Of the whole lineage, up to the end of the period."""
    versions: tuple[VersionLine, ...]
    """Of the whole lineage, when the audit was drawn."""
    facts: tuple[LiveFact, ...]
    """Of the model that was live at the end of the period."""


class Envelope(Record):
    """About the run that drew the audit, not about what it found."""

    written: str
    host: str
    user: str
    software: dict[str, str]


class PeriodAudit(Record):
    """audit.json."""

    kind: Literal["guardedit-audit"] = "guardedit-audit"
    schema_version: Literal[1] = 1
    evidence: Evidence
    evidence_digest: Digest
    envelope: Envelope
    seal: Digest | None = None
    """Digest of the record without its seal."""

    def sealed(self) -> PeriodAudit:
        """The same with a fresh seal."""
        return self.model_copy(update={"seal": digest_of(self.model_copy(update={"seal": None}))})


def audit_of(evidence: Evidence, envelope: Envelope) -> PeriodAudit:
    """The record of an audit, sealed."""
    return PeriodAudit(evidence=evidence, evidence_digest=digest_of(evidence), envelope=envelope).sealed()
