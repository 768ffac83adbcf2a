"""What the report over a period says, in order; `period_tables` holds its rows."""

from __future__ import annotations

from guardedit.audit import period_tables as tables
from guardedit.audit import supports
from guardedit.audit.period import Evidence, LineageDrift, PeriodAudit
from guardedit.audit.sheet import Sheet, Story
from guardedit.audit.words import Sign, mixed_scripts, short, visible, when


def sheet_of(audit: PeriodAudit) -> Sheet:
    """The whole report over a period."""
    evidence = audit.evidence
    sections = (
        tables.edits(evidence),
        tables.waiting(evidence),
        tables.decisions(evidence),
        tables.overrides(evidence),
        tables.incidents(evidence),
        tables.lineage(evidence),
        tables.facts(evidence),
        tables.chain(audit),
    )
    return Sheet(
        kicker=(
            "Audit report over a period",
            f"model {visible(evidence.model)}",
            period_words(evidence),
        ),
        story=_story(evidence),
        sections=(*sections, supports.of_a_period({s.anchor: s.title for s in sections})),
    )


def period_words(evidence: Evidence) -> str:
    """ "from … until …", or "from the beginning until now"."""
    since = when(evidence.since) if evidence.since else "the beginning"
    until = when(evidence.until) if evidence.until else f"ledger entry {evidence.chain.head_seq}"
    return f"from {since} until {until}"


def over_limit(evidence: Evidence) -> tuple[LineageDrift, ...]:
    """Limits on the sum of all edits that were broken by something that went live all the same."""
    live = {fact.plan_id for fact in evidence.facts}
    return tuple(
        d for d in evidence.drift if d.verdict == "fail" and d.level != "advisory" and d.plan_id in live
    )


def _story(evidence: Evidence) -> Story:
    return Story(
        title=f"Edits of {visible(evidence.model)}",
        sign=_sign(evidence),
        headline=f"{tables.counted(len(evidence.edits), 'edit')} {period_words(evidence)}: {_states(evidence)}.",
        asked_title="What is live",
        asked=_live(evidence),
        others_title="What to look at",
        others=_look_at(evidence),
        decided_title="The sum of all edits",
        decided=_sum(evidence),
        action=_action(evidence),
        warnings=_warnings(evidence),
    )


def _sign(evidence: Evidence) -> Sign:
    if over_limit(evidence):
        return Sign("✗", "A limit on the sum is broken", "bad")
    if evidence.open:
        return Sign("?", "Waits for a person", "unsure")
    if evidence.incidents or evidence.overrides:
        return Sign("!", "In order, with things to look at", "unsure")
    return Sign("✓", "In order", "good")


def _states(evidence: Evidence) -> str:
    counts: dict[str, int] = {}
    for edit in evidence.edits:
        counts[edit.state] = counts.get(edit.state, 0) + 1
    return ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "nothing happened"


def _live(evidence: Evidence) -> tuple[str, ...]:
    if evidence.live_version is None:
        return ("Nothing has been planned here yet.",)
    digest = short(evidence.live_digest)
    version = (
        f"Version {visible(evidence.live_version)} was live when this was drawn (model digest {digest})."
    )
    facts = tables.counted(len(evidence.facts), "edited fact")
    return (version, f"{facts} stood in the live model at the end of the period.")


def _look_at(evidence: Evidence) -> tuple[str, ...]:
    own = sum(override.own_plan for override in evidence.overrides)
    lines = [
        f"{tables.counted(len(evidence.incidents), 'incident')}."
        if evidence.incidents
        else "No incident is on record.",
        f"{tables.counted(len(evidence.overrides), 'approval')} by a person of what the policy had not let pass."
        if evidence.overrides
        else "Nobody let through what the policy had not let pass.",
    ]
    lifted = sum(waiver.lifted for waiver in evidence.waivers)
    lines += [f"{tables.counted(lifted, 'broken limit')} lifted by a waiver."] if lifted else []
    lines += [f"{tables.counted(own, 'approval')} by the person who had proposed the edit."] if own else []
    return tuple(lines)


def _sum(evidence: Evidence) -> tuple[str, ...]:
    if not evidence.drift:
        return (
            "The policy's limits on the sum of all edits were not judged: no edit was monitored under one.",
        )
    broken = over_limit(evidence)
    if broken:
        return tuple(f"Edit {visible(d.plan_id)} broke {d.metric} and is live." for d in broken)
    return ("No live edit broke a limit on the sum.",)


def _action(evidence: Evidence) -> str:
    if evidence.open:
        return (
            f"Decide on {tables.counted(len(evidence.open), 'plan')} that wait."
            if len(evidence.open) > 1
            else (f"Decide on {visible(evidence.open[0].plan_id)}.")
        )
    return "Nothing waits for anybody."


def _warnings(evidence: Evidence) -> tuple[str, ...]:
    texts = [
        text
        for edit in evidence.edits
        for r in (*edit.requests, *edit.stopped)
        for text in (r.subject, r.target_new, r.target_true or "", r.reason or "")
    ]
    found = [remark for text in texts if (remark := mixed_scripts(text))]
    if any(visible(text) != text for text in texts):
        found.append(
            "Characters that do not show, or that reorder text, stand in requests; they are printed as ⟨U+…⟩."
        )
    return tuple(dict.fromkeys(found))
