"""From ledger, plans and versions to the evidence of a period. Pure: the same input gives the same record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from guardedit.audit.chain import Entry
from guardedit.audit.facts import live_facts
from guardedit.audit.incidents import incidents_of
from guardedit.audit.lineage import Lineage
from guardedit.audit.period import (
    Chain,
    EditLine,
    Evidence,
    Judged,
    LineageDrift,
    OpenItem,
    OpenKind,
    Override,
    VersionLine,
    Waived,
    Word,
)
from guardedit.records import Judgement, Plan, canonical, digest_of_bytes

_OPEN: dict[str, OpenKind] = {
    "needs-approval": "waits-for-a-person", "approved": "approved-not-applied",
    "auto-approved": "approved-not-applied", "held": "held", "staged": "staged",
}  # fmt: skip
_SUM = "postop/lineage_"
"""How metrics of the sum of all edits begin."""


@dataclass(frozen=True)
class Period:
    """From when, included, until when, left out; None is open."""

    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class Span:
    """The ledger cut by a period: sequence numbers order entries, so both cuts are made there and not by the clock."""

    known: tuple[Entry, ...]
    """All entries up to the end of the period."""
    inside: tuple[Entry, ...]
    """The last of them: those of the period."""
    head: Entry | None
    """The ledger's last entry, also where it lies after the period."""


@dataclass(frozen=True)
class Source:
    """What the evidence is drawn from, each checked by whoever read it."""

    span: Span
    plans: Mapping[str, Plan]
    states: Mapping[str, str]
    """Where each plan stands at the end of the period."""
    lineage: Lineage | None
    model: str


def cut(entries: tuple[Entry, ...], period: Period) -> Span:
    """The entries of a period, and those before."""
    times = [datetime.fromisoformat(entry.at) for entry in entries]
    ends = [i for i, at in enumerate(times) if period.until is None or at < period.until]
    known = entries[: ends[-1] + 1] if ends else ()
    starts = [i for i, at in enumerate(times[: len(known)]) if period.since is None or at >= period.since]
    inside = known[starts[0] :] if starts else ()
    return Span(known, inside, entries[-1] if entries else None)


def evidence_of(source: Source, period: Period) -> Evidence:
    """Everything an audit says, in the ledger's order."""
    span, lineage = source.span, source.lineage
    named = dict.fromkeys(e.body["plan_id"] for e in span.inside if e.body.get("plan_id") in source.plans)
    edits = tuple(_edit(source, plan_id) for plan_id in named)
    return Evidence(
        since=period.since.isoformat() if period.since else None,
        until=period.until.isoformat() if period.until else None,
        model=source.model,
        base_digest=lineage.base.digest if lineage else None,
        live_digest=lineage.digest if lineage else None,
        live_version=lineage.version if lineage else None,
        chain=_chain(span),
        edits=edits,
        open=_open(source),
        waivers=tuple(w for line in edits for w in _waivers(source.plans[line.plan_id])),
        overrides=tuple(o for line in edits for o in _overrides(source, line)),
        incidents=incidents_of(span.inside),
        drift=tuple(d for entry in span.known for d in _sums(entry)),
        versions=_versions(lineage),
        facts=live_facts(source.plans, source.states, span.known),
    )


def _chain(span: Span) -> Chain:
    head, inside = span.head, span.inside
    return Chain(
        head_seq=head.seq if head else 0,
        head_digest=head.digest if head else None,
        first=inside[0].seq if inside else None,
        last=inside[-1].seq if inside else None,
        opening=inside[0].prev if inside else None,
        closing=inside[-1].digest if inside else None,
        untracked=sum(entry.kind == "untracked" for entry in inside),
    )


def _of(source: Source, plan_id: str) -> tuple[Entry, ...]:
    return tuple(e for e in source.span.known if e.body.get("plan_id") == plan_id)


def _edit(source: Source, plan_id: str) -> EditLine:
    plan, entries = source.plans[plan_id], _of(source, plan_id)
    monitored = last_monitoring(entries)
    return EditLine(
        plan_id=plan_id,
        state=source.states[plan_id],
        editor=plan.editor,
        requests=plan.requests,
        stopped=plan.stopped,
        proposer=plan.author,
        planned=next(e.at for e in entries if e.kind == "planned"),
        decisions=words_of(entries),
        preop=_judged(plan.judgement),
        postop=_judged(Judgement.model_validate(monitored["postop"])) if monitored else None,
        plan_digest=digest_of_bytes(canonical(plan)),
        policy_digest=plan.policy_digest,
        delta_digest=plan.delta.file_digest,
        digest_before=plan.model_digest,
        digest_staged=next(
            (e.body["digest_staged"] for e in reversed(entries) if "digest_staged" in e.body), None
        ),
        entries=tuple(e.seq for e in entries),
    )


def last_monitoring(entries: tuple[Entry, ...]) -> dict[str, Any] | None:
    """The body of the last entry that holds a monitor's verdict."""
    return next((e.body for e in reversed(entries) if e.body.get("postop")), None)


def words_of(entries: tuple[Entry, ...]) -> tuple[Word, ...]:
    """Decisions, in the ledger's order."""
    said = [(entry.seq, entry.body["decision"]) for entry in entries if entry.body.get("decision")]
    names = ("outcome", "approver", "reason", "at", "plan_digest", "drift_digest", "key", "ticket")
    return tuple(
        Word(seq=seq, own=word.get("own", False), **{name: word.get(name) for name in names})
        for seq, word in said
    )


def _judged(judgement: Judgement) -> Judged:
    return Judged(
        verdict=judgement.verdict,
        outcome=judgement.outcome,
        reason=judgement.reason,
        kept=sum(f.verdict == "pass" for f in judgement.findings),
        limits=len(judgement.findings),
    )


def _open(source: Source) -> tuple[OpenItem, ...]:
    """What waits at the end of the period, also from before it."""
    found = []
    for plan_id, state in source.states.items():
        if state in _OPEN and plan_id in source.plans:
            last = [e for e in _of(source, plan_id) if e.body.get("event")][-1]
            monitored = last_monitoring(_of(source, plan_id)) if state == "held" else None
            reason = monitored["postop"]["reason"] if monitored else source.plans[plan_id].judgement.reason
            found.append(OpenItem(plan_id=plan_id, kind=_OPEN[state], since=last.at, reason=reason))
    return tuple(found)


def _waivers(plan: Plan) -> tuple[Waived, ...]:
    lifted = {f.metric for f in plan.judgement.findings if f.waiver is not None}
    return tuple(
        Waived(plan_id=plan.plan_id, lifted=w.metric in lifted, **w.model_dump(mode="json"))
        for w in plan.waivers
    )


def _overrides(source: Source, line: EditLine) -> tuple[Override, ...]:
    """Approvals by a person of what the policy had not let pass: a plan, or a held edit."""
    given = [word for word in line.decisions if word.outcome == "approved"]
    return tuple(
        Override(
            plan_id=line.plan_id,
            seq=word.seq,
            approver=word.approver,
            own_plan=word.own or word.approver == line.proposer,
            reason=word.reason,
            stage="postop" if word.drift_digest else "preop",
            broken=_broken(source, line.plan_id, word),
        )
        for word in given
    )


def _broken(source: Source, plan_id: str, word: Word) -> tuple[str, ...]:
    judgement = source.plans[plan_id].judgement
    if word.drift_digest:
        monitored = last_monitoring(tuple(e for e in _of(source, plan_id) if e.seq < word.seq))
        judgement = Judgement.model_validate(monitored["postop"]) if monitored else judgement
    binding = [f for f in judgement.findings if f.level != "advisory" and f.waiver is None]
    return tuple(f.metric for f in binding if f.verdict != "pass")


def _sums(entry: Entry) -> tuple[LineageDrift, ...]:
    """The policy's limits on the sum, as judged when this edit was committed, held or dropped by the monitor."""
    # A held edit's monitoring stands again in the entry that settles it; it is told once.
    if entry.kind not in ("committed", "held", "rolled-back") or not entry.body.get("postop"):
        return ()
    if entry.kind != "held" and entry.body["postop"]["outcome"] == "held":
        return ()
    findings = Judgement.model_validate(entry.body["postop"]).findings
    names = ("rule", "metric", "value", "op", "limit", "level", "verdict")
    return tuple(
        LineageDrift(
            seq=entry.seq, plan_id=entry.body["plan_id"], **{name: getattr(f, name) for name in names}
        )
        for f in findings
        if f.metric.startswith(_SUM)
    )


def _versions(lineage: Lineage | None) -> tuple[VersionLine, ...]:
    names = ("generation", "name", "action", "edit_id", "digest")
    return tuple(
        VersionLine(**{name: getattr(v, name) for name in names}, record=digest_of_bytes(canonical(v)))
        for v in (lineage.versions if lineage else ())
    )
