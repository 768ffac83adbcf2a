"""The frozen types that travel between rooms. No torch here: an auditor can read every record without it.

A record refuses unknown keys, NaN and infinity. `canonical(record)` is the byte string that digests are taken of
(keys sorted, no white space, UTF-8, as RFC 8785 does for the values that occur here).
"""

from __future__ import annotations

from guardedit.records.base import (
    ABSENT,
    Digest,
    Grown,
    Level,
    Outcome,
    R,
    Record,
    Scope,
    Stage,
    Verdict,
    canonical,
    digest_of,
    digest_of_bytes,
    is_activation,
    parse_record,
)
from guardedit.records.deltas import ActivationNote, DeltaRecord, GateLatent, GateNote, TensorChange
from guardedit.records.measured import LatentLeak, ProbeChange, ProbePrompts, RiskReport, Score, TokenMove
from guardedit.records.plans import Decision, Finding, Judgement, Plan, RequestOutcome, Screened, Waiver
from guardedit.records.reports import AuditReport, DomainDrift, DriftReport, LatentDrift
from guardedit.records.requests import EditRequest

__all__ = [
    "ABSENT",
    "ActivationNote",
    "AuditReport",
    "Decision",
    "DeltaRecord",
    "Digest",
    "DomainDrift",
    "DriftReport",
    "EditRequest",
    "Finding",
    "GateLatent",
    "GateNote",
    "Grown",
    "Judgement",
    "LatentDrift",
    "LatentLeak",
    "Level",
    "Outcome",
    "Plan",
    "ProbeChange",
    "ProbePrompts",
    "R",
    "Record",
    "RequestOutcome",
    "RiskReport",
    "Scope",
    "Score",
    "Screened",
    "Stage",
    "TensorChange",
    "TokenMove",
    "Verdict",
    "Waiver",
    "canonical",
    "digest_of",
    "digest_of_bytes",
    "is_activation",
    "parse_record",
]
