"""Which of the ledger's entries are incidents, and of what kind."""

from __future__ import annotations

from collections.abc import Iterable

from guardedit.audit.chain import Entry
from guardedit.audit.period import Incident, IncidentKind


def incidents_of(entries: Iterable[Entry]) -> tuple[Incident, ...]:
    """The incidents among these entries, in the ledger's order."""
    return tuple(
        Incident(
            seq=entry.seq,
            at=entry.at,
            plan_id=str(entry.body.get("plan_id", "")),
            kind=kind,
            by=entry.body.get("by"),
            reason=_reason(entry),
        )
        for entry in entries
        if (kind := kind_of(entry)) is not None
    )


def kind_of(entry: Entry) -> IncidentKind | None:
    """What kind of incident an entry tells of, or None when it is none."""
    if entry.kind == "planned":
        return "blocked" if entry.body.get("outcome") == "blocked" else None
    if entry.kind == "rolled-back":
        return _rolled_back(entry)
    plain: dict[str, IncidentKind] = {"held": "held", "outdated": "stale"}
    return plain.get(entry.kind)


def _rolled_back(entry: Entry) -> IncidentKind:
    """Why an edit was rolled back. Recovery writes `undone` and names nobody; a person's undo names who asked."""
    body, reason = entry.body, str(entry.body.get("reason", ""))
    if "undone" in body:
        return "undone-on-request" if body.get("by") else "recovered"
    if reason.startswith("the monitor did not finish"):
        return "monitor-unfinished"
    if (body.get("postop") or {}).get("outcome") == "rolled-back":
        return "rolled-back-by-monitor"
    if reason.startswith("rejected by"):
        return "held-edit-rejected"
    if (body.get("postop") or {}).get("outcome") == "held":
        return "undone-on-request"
    return "commit-failed"


def _reason(entry: Entry) -> str:
    if entry.kind == "held":
        return str((entry.body.get("postop") or {}).get("reason", ""))
    if entry.kind == "outdated":
        return "changed since it was planned: " + ", ".join(map(str, entry.body.get("moved", ())))
    return str(entry.body.get("reason", ""))
