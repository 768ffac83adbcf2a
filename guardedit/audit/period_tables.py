"""The sections of a report over a period, row by row."""

from __future__ import annotations

from collections.abc import Sequence

from guardedit.audit.period import EditLine, Evidence, Judged, LiveFact, PeriodAudit, Word
from guardedit.audit.sheet import Cell, Code, Section, Table
from guardedit.audit.words import VERDICTS, Sign, number, percent, quantity, score_title, short, visible, when
from guardedit.records import EditRequest

ROWS = 250
"""Most rows of a table, so that the page stays small; audit.json holds all."""
_STATES = {
    "committed": Sign("✓", "committed", "good"), "rolled-back": Sign("↶", "rolled back", "unsure"),
    "blocked": Sign("✗", "blocked", "bad"), "rejected": Sign("✗", "rejected", "bad"),
    "held": Sign("?", "held", "unsure"), "needs-approval": Sign("?", "waits for a person", "unsure"),
    "approved": Sign("?", "approved, not applied", "unsure"), "staged": Sign("?", "staged", "unsure"),
    "auto-approved": Sign("?", "passed, not applied", "unsure"),
}  # fmt: skip
_INCIDENTS = {
    "rolled-back-by-monitor": Sign("↶", "rolled back by the monitor", "bad"),
    "monitor-unfinished": Sign("!", "the monitor did not finish", "bad"),
    "commit-failed": Sign("!", "the commit failed", "bad"),
    "held": Sign("?", "held", "unsure"),
    "held-edit-rejected": Sign("✗", "held edit rejected", "unsure"),
    "blocked": Sign("✗", "blocked by the policy", "unsure"),
    "recovered": Sign("!", "recovered after a crash", "bad"),
    "stale": Sign("→", "out of date", "unsure"),
    "undone-on-request": Sign("↶", "undone on request", "unsure"),
}
Rows = Sequence[tuple[Cell, ...]]


def counted(n: int, noun: str) -> str:
    """ "1 edit", "2 edits"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def table(
    caption: str, head: tuple[str, ...], rows: Rows, numeric: frozenset[int] = frozenset()
) -> tuple[Table, ...]:
    """A table of at most `ROWS` rows, the newest; none where there is no row."""
    note = f"The newest {ROWS} of {len(rows):,} rows; audit.json holds all." if len(rows) > ROWS else ""
    return (Table(caption, head, tuple(rows[-ROWS:]), numeric, note),) if rows else ()


def edits(evidence: Evidence) -> Section:
    """Every edit with an entry in the period, and its digests."""
    head = ("Edit", "Fact", "State", "Editor", "Proposed by", "Before the write", "On the copy")
    rows = [
        (Code(e.plan_id), fact_words(e), state_of(e.state), e.editor, visible(e.proposer), judged(e.preop),
         judged(e.postop))
        for e in evidence.edits
    ]  # fmt: skip
    digests = [
        (Code(e.plan_id), Code(short(e.plan_digest)), Code(short(e.policy_digest)), Code(short(e.delta_digest)),
         Code(short(e.digest_before)), Code(short(e.digest_staged)), ", ".join(map(str, e.entries)))
        for e in evidence.edits
    ]  # fmt: skip
    reasons = [
        (Code(e.plan_id), visible(r.subject), visible(r.reason or "none given"), when(e.planned))
        for e in evidence.edits
        for r in e.requests
    ]
    names = ("Edit", "Plan", "Policy", "Change", "Model before", "Staged copy", "Ledger entries")
    return Section(
        "edits",
        "Edits",
        (f"{counted(len(evidence.edits), 'edit')} with an entry in the period, as they stood at its end.",),
        tables=(
            *table("Edits of the period", head, rows),
            *table("Digests of the edits, first twelve digits", names, digests),
            *table("Why and when they were planned", ("Edit", "Subject", "Reason", "Planned"), reasons),
        ),
    )


def fact_words(edit: EditLine) -> str:
    """What an edit is about, on one line."""
    if len(edit.requests) == 1:
        return one_fact(edit.requests[0])
    left = f", {len(edit.stopped)} left out by the policy" if edit.stopped else ""
    return f"{counted(len(edit.requests), 'fact')} together{left}"


def one_fact(request: EditRequest) -> str:
    """ "Eiffel Tower: Paris → Rome"."""
    old = visible((request.target_true or "").strip(" "))
    return f"{visible(request.subject)}: {old}{' ' if old else ''}→ {visible(request.target_new.strip(' '))}"


def state_of(state: str) -> Sign:
    """Icon and word of a state."""
    return _STATES.get(state, Sign("→", visible(state), "quiet"))


def judged(stage: Judged | None) -> Cell:
    """Verdict of a stage, with how many limits were kept."""
    if stage is None:
        return "not monitored"
    sign = VERDICTS[stage.verdict]
    return Sign(sign.icon, f"{sign.word} ({stage.kept} of {stage.limits})", sign.tone)


def waiting(evidence: Evidence) -> Section:
    """What waits for somebody."""
    words = {
        "waits-for-a-person": "approve or reject", "approved-not-applied": "apply, or leave it to expire",
        "held": "look at the monitor's report, then approve or reject", "staged": "wait, or recover after a crash",
    }  # fmt: skip
    rows = [(Code(o.plan_id), words[o.kind], when(o.since), visible(o.reason)) for o in evidence.open]
    lead = "Open at the end of the period, also from before it." if rows else "Nothing waits for anybody."
    return Section(
        "open", "Open reviews and pending plans", (lead,),
        tables=table("What is open", ("Plan", "To do", "Since", "Why"), rows),
    )  # fmt: skip


def decisions(evidence: Evidence) -> Section:
    """Who said what on which plan."""
    rows = [
        (Code(e.plan_id), visible(w.outcome), visible(w.approver), visible(w.reason), when(w.at),
         "the held copy" if w.drift_digest else "the plan", _hand(w), str(w.seq))
        for e in evidence.edits for w in e.decisions
    ]  # fmt: skip
    lead = "Each word is bound to the digest of a plan, and of the monitor's report where a copy was held."
    head = ("Edit", "Word", "By", "Reason", "When", "About", "Signed", "Ledger entry")
    return Section(
        "decisions",
        "Decisions",
        (lead,),
        tables=table("Words on plans and held copies", head, rows, frozenset({7})),
    )


def _hand(word: Word) -> str:
    """Whose hand a word is in."""
    if word.outcome == "auto-approved":
        return "the policy's own"
    signed = f"key {word.key[:12]}" if word.key else "unsigned"
    return f"{signed}, break-glass {visible(word.ticket)}" if word.ticket else signed


def overrides(evidence: Evidence) -> Section:
    """Waivers, and approvals of what the policy had not let pass."""
    waived = [
        (Code(w.plan_id), Code(w.metric), visible(w.author), visible(w.reason), when(w.expires),
         "yes" if w.lifted else "no: nothing was broken")
        for w in evidence.waivers
    ]  # fmt: skip
    over = [
        (Code(o.plan_id), visible(o.approver), "yes" if o.own_plan else "no", visible(o.reason),
         "before the write" if o.stage == "preop" else "on the staged copy",
         Code(", ".join(o.broken)) if o.broken else "none; the policy asks for a person", str(o.seq))
        for o in evidence.overrides
    ]  # fmt: skip
    lead = (
        ()
        if waived or over
        else ("No limit was waived, and nobody let through what the policy had not let pass.",)
    )
    head = ("Edit", "Approved by", "Own plan", "Reason", "Stage", "Limits not kept", "Ledger entry")
    return Section(
        "overrides", "Waivers and overrides", lead,
        tables=(
            *table("Waivers", ("Edit", "Limit", "By", "Reason", "Ends", "Lifted a broken limit"), waived),
            *table("Overrides: a person approved what the policy had not let pass", head, over, frozenset({6})),
        ),
    )  # fmt: skip


def incidents(evidence: Evidence) -> Section:
    """What did not go the plain way."""
    rows = [
        (str(i.seq), when(i.at), Code(i.plan_id), _INCIDENTS[i.kind], visible(i.by or ""), visible(i.reason))
        for i in evidence.incidents
    ]
    lead = [] if rows else ["No incident is on record in the period."]
    lead += [
        f"MLflow was away {counted(evidence.chain.untracked, 'time')}; that is no incident of an edit."
    ] * bool(evidence.chain.untracked)
    head = ("Ledger entry", "When", "Edit", "What", "By", "Reason")
    return Section(
        "incidents",
        "Incidents",
        tuple(lead),
        tables=table("What did not go the plain way", head, rows, frozenset({0})),
    )


def lineage(evidence: Evidence) -> Section:
    """The policy's limits on the sum, edit by edit, and the versions."""
    sums = [
        (Code(d.plan_id), score_title(d.metric.removeprefix("postop/")), number(d.value),
         f"{d.op} {number(d.limit)}", VERDICTS[d.verdict], d.level, str(d.seq))
        for d in evidence.drift
    ]  # fmt: skip
    versions = [
        (
            str(v.generation),
            Code(v.name),
            "edit" if v.action == "edit" else "undo",
            Code(short(v.digest)),
            Code(short(v.record)),
        )
        for v in evidence.versions
    ]
    lead = (
        "Each monitored copy is compared with the base model too, so that many small edits cannot add up unseen."
        if sums
        else "No limit on the sum of all edits was judged."
    )
    head = ("Edit", "Limit on the sum", "Observed", "Allowed", "Verdict", "Level", "Ledger entry")
    names = ("Number", "Version", "What", "Model", "Record")
    return Section(
        "lineage", "Drift over the lineage", (lead,),
        tables=(
            *table("The sum of all edits against its limits", head, sums, frozenset({2, 3, 6})),
            *table("Versions", names, versions, frozenset({0})),
        ),
    )  # fmt: skip


def facts(evidence: Evidence) -> Section:
    """The edited facts of the live model."""
    rows = [
        (visible(f.request.subject), one_fact(f.request), _share(f.p_new_before), _share(f.p_new_after),
         side_effects(f), Code(f.plan_id))
        for f in evidence.facts
    ]  # fmt: skip
    lead = (
        "model_card.md holds the same as a fragment for a model card." if rows else "No edited fact is live."
    )
    head = ("Subject", "Fact", "P(new) before", "P(new) after", "Measured elsewhere", "Edit")
    return Section(
        "facts", "Edited facts of the live model", (lead,),
        tables=table("Edited facts", head, rows, frozenset({2, 3})),
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "not measured" if value is None else percent(value, 4)


def side_effects(fact: LiveFact) -> str:
    """What the monitor measured on everything else, on one line."""
    parts = [f"{score_title(name)}: {quantity(value, unit)}" for name, value, unit in fact.effects]
    return "; ".join(parts) or "not measured"


def chain(audit: PeriodAudit) -> Section:
    """Where the ledger stood, and how to check all of this."""
    c = audit.evidence.chain
    span = "none" if c.first is None else f"{c.first} to {c.last}"
    rows: list[tuple[Cell, ...]] = [
        ("Last entry of the ledger", str(c.head_seq)),
        ("Its digest: keep it elsewhere", Code(c.head_digest) if c.head_digest else "the ledger is empty"),
        ("Entries of the period", span),
        ("Entry before the period", Code(c.opening) if c.opening else "none"),
        ("Last entry of the period", Code(c.closing) if c.closing else "none"),
        ("Base model", Code(audit.evidence.base_digest) if audit.evidence.base_digest else "none"),
        ("Live model", Code(audit.evidence.live_digest) if audit.evidence.live_digest else "none"),
        ("Digest of this evidence", Code(audit.evidence_digest)),
    ]
    lead = (
        "The whole chain, the bytes of every plan and the records of every version were checked when this was drawn. "
        "The weights were not read: `guardedit verify` does that. The first command checks this report with its home, "
        "the second by itself."
    )
    return Section(
        "chain", "The ledger, and how to check this report", (lead,),
        tables=(Table("Where the ledger stood", ("What", "Value"), tuple(rows)),),
        commands=("guardedit verify audit.json", "guardedit verify audit.json --alone", "guardedit verify"),
    )  # fmt: skip
