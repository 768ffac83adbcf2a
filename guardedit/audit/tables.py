"""Tables that several sections of the report share."""

from __future__ import annotations

from collections.abc import Mapping

from guardedit.audit.sheet import Code, Table
from guardedit.audit.story import allowed, observed, unexpected
from guardedit.audit.words import SCOPES, VERDICTS, Sign, excerpt, percent, quantity, score_title, visible
from guardedit.records import AuditReport, Finding, ProbeChange, Score

ROWS = 25
"""Longest table shown; what is left out is in report.json, and the table says so."""

_ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}
_LEVELS = {
    "preop": "Hard: stops the edit, nobody can lift it. Soft: a person decides or waives it. Advisory: only noted.",
    "postop": "A broken hard or soft limit rolls the edit back. Advisory: only noted.",
}


def left_out(count: int, limit: int) -> str:
    """A remark on the rows that a table does not show."""
    return f"{count - limit} more rows are in report.json." if count > limit else ""


def probes_table(caption: str, probes: tuple[ProbeChange, ...]) -> Table | None:
    """Prompts before and after: changes nobody meant first, then by how far the answer moved."""
    if not probes:
        return None
    ranked = sorted(probes, key=lambda p: (not unexpected(p), -p.kl_nats, p.prompt))
    rows = tuple(
        (
            _change(p),
            SCOPES[p.scope],
            excerpt(p.prompt) + " …",
            excerpt(p.before.strip(" ")),
            excerpt(p.after.strip(" ")),
            f"{percent(p.p_before)} → {percent(p.p_after)}",
            quantity(p.kl_nats, ""),
        )
        for p in ranked[:ROWS]
    )
    head = ("Answer", "About", "Prompt", "Before", "After", "P(old answer)", "KL, nats")
    return Table(caption, head, rows, frozenset({5, 6}), left_out(len(ranked), ROWS))


def _change(probe: ProbeChange) -> Sign:
    if probe.before == probe.after:
        return Sign("=", "same", "quiet")
    return Sign("✗", "lost", "bad") if unexpected(probe) else Sign("→", "changed, as it may", "good")


def limits_table(audit: AuditReport, caption: str, findings: tuple[Finding, ...]) -> Table:
    """Sentence, observed, limit, verdict: the broken ones first."""
    ranked = sorted(findings, key=lambda f: _ORDER[f.verdict])
    rows = tuple(
        (
            verdict_of(f),
            visible(f.sentence),
            observed(audit, f),
            allowed(audit, f),
            f.level,
            Code(f.metric),
        )
        for f in ranked
    )
    return Table(
        caption,
        ("Verdict", "What it limits", "Observed", "Allowed", "Level", "Metric"),
        rows,
        frozenset({2, 3}),
        note=_LEVELS[findings[0].stage] if findings else "",
    )


def verdict_of(finding: Finding) -> Sign:
    """Kept, broken, waived or unknown."""
    sign = VERDICTS[finding.verdict]
    if finding.verdict == "pass":
        return sign
    if finding.waiver:
        return Sign(sign.icon, f"{sign.word}, waived", "unsure")
    return Sign(sign.icon, f"{sign.word}, noted", "unsure") if finding.level == "advisory" else sign


def scores_table(caption: str, scores: tuple[Score, ...], worth: Mapping[str, str] | None = None) -> Table:
    """All scores with interval, n and percentile, and what each has been worth where that is known; folded."""
    rows = tuple(
        (
            score_title(s.name),
            SCOPES[s.scope],
            quantity(s.value, s.unit) if s.value is not None else "not measured",
            _interval(s),
            "" if s.n is None else f"{s.n:,}",
            "" if s.percentile is None else f"{s.percentile:.0f}",
            _remark(s, worth or {}),
            Code(s.name),
        )
        for s in scores
    )
    head = ("Score", "About", "Value", "95 % interval", "n", "Percentile among real edits", "Remark", "Name")
    return Table(caption, head, rows, frozenset({2, 3, 4, 5}), folded=True, under=frozenset({6, 7}))


def _remark(score: Score, worth: Mapping[str, str]) -> str:
    """What is said of its value, and what such values have been worth."""
    known = f"On measured edits it {worth[score.name]}." if score.name in worth else ""
    return ". ".join(part for part in (visible(score.reason or "").rstrip("."), known) if part)


def _interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return ""
    return f"{quantity(score.low, score.unit)} to {quantity(score.high, score.unit)}"
