"""What a screening of many requests comes to: who goes on, and what is said where nobody does. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from guardedit.gate.rules import Policy
from guardedit.records import EditRequest, Finding, Judgement, Score, Screened

_NAMED = 5
"""Requests that a reason names; the plan lists all."""


def goes_on(judgement: Judgement) -> bool:
    """Whether a screened request may be solved with the others.

    Only a pass may: what a person would have to look at would hold up all the others, and can be waived or planned
    alone.
    """
    return judgement.outcome == "auto-approved"


def screened(request: EditRequest, scores: Sequence[Score], judgement: Judgement) -> Screened:
    """The record of one request's screening."""
    return Screened(
        subject=request.subject,
        prompt=request.filled,
        target_new=request.target_new,
        stopped=not goes_on(judgement),
        reason=judgement.reason,
        scores={score.name: score.value for score in scores},
        findings=tuple(f for f in judgement.findings if f.verdict != "pass" or f.waiver is not None),
    )


def judge_stopped(rows: Sequence[Screened], policy: Policy) -> Judgement:
    """The judgement of a plan that ends with its screening: blocked, with the findings of what is stopped."""
    stopped = [row for row in rows if row.stopped]
    findings = tuple(_of(row, finding) for row in stopped for finding in row.findings)
    named = "; ".join(f"{row.subject}: {row.reason}" for row in stopped[:_NAMED])
    more = f"; and {len(stopped) - _NAMED} more" if len(stopped) > _NAMED else ""
    all_of = "all" if len(stopped) == len(rows) else f"{len(stopped)} of"
    return Judgement(
        findings=findings,
        outcome="blocked",
        verdict="fail" if any(f.verdict == "fail" and f.waiver is None for f in findings) else "inconclusive",
        reason=f"Before anything was solved, the policy stops {all_of} {len(rows)} requests. {named}{more}",
        policy_digest=policy.digest,
    )


def _of(row: Screened, finding: Finding) -> Finding:
    return finding.model_copy(update={"sentence": f"{row.subject}: {finding.sentence}"})
