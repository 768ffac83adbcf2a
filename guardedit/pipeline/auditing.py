"""An audit over a period, and the check of a report file against its home. Reads records; loads no model."""

from __future__ import annotations

import platform
import socket
from pathlib import Path
from typing import Any

from guardedit.audit.chain import Entry, Head, require_head
from guardedit.audit.checking import ReportRecord, check_digests, read_report, require_same
from guardedit.audit.gathering import Period, Source, cut, evidence_of, last_monitoring
from guardedit.audit.lineage import Lineage
from guardedit.audit.period import Envelope, Evidence, PeriodAudit, audit_of
from guardedit.errors import BadRequestError, IntegrityError, NotFoundError
from guardedit.gate.approvals import parse_time
from guardedit.pipeline.applying import OUTCOMES, UNTRACKED
from guardedit.pipeline.history import states_in
from guardedit.pipeline.recovery import disagreement
from guardedit.pipeline.workspace import Workspace, versions
from guardedit.records import AuditReport, DriftReport, Judgement, Record, RequestOutcome, digest_of_bytes

_ON_THE_WAY = {"applied": "staged", "monitored": "staged"}
"""States that an audit calls by the word it has always had for them, so that audits from before still bear out."""


def period_of(since: str | None, until: str | None) -> Period:
    """A period of two ISO 8601 times; BadRequestError where one is none, or the end does not follow the start."""
    start, end = (parse_time(text) if text else None for text in (since, until))
    if start is not None and end is not None and end <= start:
        raise BadRequestError(f"--until {until} does not lie after --since {since}")
    return Period(start, end)


def audit(workspace: Workspace, period: Period) -> PeriodAudit:
    """The evidence of a period and the envelope of this run.

    IntegrityError names what is not as it was recorded: the chain, a plan's bytes, a version's record, or where ledger
    and versions tell different stories.
    """
    workspace.ledger.verify()
    problem = disagreement(workspace) if workspace.store.exists else None
    if problem is not None and not _ON_THE_WAY.keys() & set(workspace.states().values()):
        raise IntegrityError(f"{problem}; `guardedit recover` puts right what a crash left")
    lineage = workspace.store.lineage() if workspace.store.exists else None
    evidence = _evidence(workspace, workspace.ledger.entries(), lineage, period)
    envelope = Envelope(
        written=workspace.now().isoformat(),
        host=socket.gethostname(),
        user=workspace.user,
        software={**versions(), "platform": platform.platform()},
    )
    return audit_of(evidence, envelope)


def _evidence(
    workspace: Workspace, entries: tuple[Entry, ...], lineage: Lineage | None, period: Period
) -> Evidence:
    span = cut(entries, period)
    states = {plan_id: _ON_THE_WAY.get(state, state) for plan_id, state in states_in(span.known).items()}
    plans = {plan_id: workspace.read_plan(plan_id) for plan_id in states}
    model = lineage.base.name if lineage else workspace.settings.model
    return evidence_of(Source(span, plans, states, lineage, model), period)


def verify_file(path: Path, workspace: Workspace | None) -> dict[str, Any]:
    """Check a report file: schema, form and digests, and with a workspace that its ledger bears out every field.

    The ledger is asked first: it can say which field was changed, a seal only that one was. IntegrityError names it.
    """
    record = read_report(path)
    checked = ["schema", "form"]
    unchecked: tuple[str, ...] = ()
    if workspace is not None:
        workspace.ledger.verify()
        unchecked = _check_against(workspace, record, path.name)
        checked.append("ledger")
    if workspace is None or record.seal is not None or isinstance(record, PeriodAudit):
        checked += check_digests(record, path.name)
    head = workspace.ledger.head() if workspace is not None else None
    return {
        "file": str(path),
        "kind": "audit" if isinstance(record, PeriodAudit) else "report",
        "digest": digest_of_bytes(path.read_bytes()),
        "seal": record.seal,
        "checked": checked,
        "not_in_the_ledger": list(unchecked),
        "ledger_head": head.digest if head else None,
    }


def _check_against(workspace: Workspace, record: ReportRecord, name: str) -> tuple[str, ...]:
    """Returns the fields of which the ledger says nothing."""
    if isinstance(record, PeriodAudit):
        _check_period(workspace, record, name)
        return ("envelope",)
    _check_edit(workspace, record, name)
    return ("mlflow_run_id", "mlflow_note", "not_measured")


def _check_period(workspace: Workspace, record: PeriodAudit, name: str) -> None:
    """Draw the evidence again from the ledger as it was, and compare field by field."""
    evidence, entries = record.evidence, workspace.ledger.entries()
    chain = evidence.chain
    if chain.head_digest is not None:
        require_head(entries, Head(chain.head_seq, chain.head_digest), f"chain.head_seq of {name}")
    elif chain.head_seq:
        raise IntegrityError(f"chain.head_digest: {name} names entry {chain.head_seq} without its digest")
    lineage = _lineage_then(workspace, evidence, name)
    period = _period_then(evidence, name)
    again = _evidence(workspace, entries[: chain.head_seq], lineage, period)
    found, expected = evidence.model_dump(mode="json"), again.model_dump(mode="json")
    if lineage is None:
        # A home without versions does not know its model's name: it is what the command was told.
        expected["model"] = found["model"]
    require_same(found, expected, name, f"the ledger in {workspace.home}")


def _lineage_then(workspace: Workspace, evidence: Evidence, name: str) -> Lineage | None:
    if evidence.live_version is None:
        return None
    try:
        return workspace.store.lineage().upto(evidence.live_version)
    except NotFoundError as error:
        raise IntegrityError(
            f"live_version: {name} names one that {workspace.home} does not have: {error}"
        ) from error


def _period_then(evidence: Evidence, name: str) -> Period:
    try:
        return period_of(evidence.since, evidence.until)
    except BadRequestError as error:
        raise IntegrityError(f"since or until: {name} cannot be checked: {error}") from error


def _check_edit(workspace: Workspace, audit: AuditReport, name: str) -> None:
    """Put the report together again from the ledger as it was when the report was made, and compare."""
    history, ledger = workspace.history(audit.edit_id), f"the ledger in {workspace.home}"
    if not any(entry.kind == "planned" for entry in history):
        raise IntegrityError(f"edit_id: {name} is about {audit.edit_id!r}, of which {ledger} knows nothing")
    told = [e for e in history if e.kind != UNTRACKED]
    ends = [i for i, entry in enumerate(told) if entry.at == audit.created]
    if not ends:
        raise IntegrityError(
            f"created: {name} says {audit.created!r}; {ledger} has no entry of that time about {audit.edit_id}"
        )
    expected = _facts_then(workspace, audit.edit_id, tuple(told[: ends[-1] + 1]))
    found = {key: value for key, value in audit.model_dump(mode="json").items() if key in expected}
    require_same(found, expected, name, ledger)
    lineage = workspace.store.lineage()
    if audit.digest_after not in {lineage.base.digest, *(v.digest for v in lineage.versions)}:
        raise IntegrityError(
            f"digest_after: {name} names {audit.digest_after}, which was never live in {workspace.home}"
        )


def _facts_then(workspace: Workspace, edit_id: str, history: tuple[Entry, ...]) -> dict[str, Any]:
    """The fields of a report of which the ledger and the plan know, after these entries."""
    plan, facts = workspace.read_plan(edit_id), last_monitoring(history) or {}
    state = states_in(history)[edit_id]
    words = [entry.body["decision"] for entry in history if entry.body.get("decision")]
    records: dict[str, type[Record]] = {"drift": DriftReport, "drift_base": DriftReport, "postop": Judgement}
    measured = {
        key: kind.model_validate(facts[key]).model_dump(mode="json") if facts.get(key) else None
        for key, kind in records.items()
    }
    rows = [RequestOutcome.model_validate(row).model_dump(mode="json") for row in facts.get("outcomes", ())]
    return {
        "plan_digest": plan.digest,
        "plan": plan.model_dump(mode="json"),
        "decision": words[-1] if words else None,
        "outcome": OUTCOMES.get(state, state),
        **measured,
        "target_probabilities": facts.get("target_probabilities", {}),
        "outcomes": rows,
        "digest_before": plan.model_digest,
        "digest_staged": facts.get("digest_staged"),
    }
