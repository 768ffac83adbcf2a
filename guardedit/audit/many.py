"""A joint plan's requests, a table row each: what was asked, how it was screened, whether it holds."""

from __future__ import annotations

from typing import Any

from guardedit.audit.sheet import Cell, Table
from guardedit.audit.tables import left_out
from guardedit.audit.words import Sign, percent, visible
from guardedit.records import AuditReport, EditRequest, Plan, RequestOutcome, Screened

HEAD = ("Prompt", "Says today", "Shall say")
SHOWN = 200
"""Rows of a table in the report; MLflow's tables and report.json have all."""


def words_of(request: EditRequest) -> tuple[str, str, str]:
    """Prompt, today's answer, new answer."""
    return (
        visible(request.asked) + " …",
        visible((request.target_true or "whatever it says").strip(" ")),
        visible(request.target_new.strip(" ")),
    )


def lead(audit: AuditReport, where: str) -> tuple[str, ...]:
    """What the picture shows, and how many of the requests hold."""
    if not audit.outcomes:
        worst = (
            "the least likely new answer and the most likely old one" if where == "rehearsed" else "a mean"
        )
        return (
            f"With several facts, the picture shows, before the edit, the hardest of them, and {where}: {worst}.",
        )
    held = sum(row.holds for row in audit.outcomes)
    lowest = percent(min(row.p_new_after for row in audit.outcomes))
    return (
        f"With several facts, the picture shows their mean. {held} of {len(audit.outcomes)} hold: the new answer beats "
        f"the old one. The least likely new answer has {lowest}.",
    )


def asked(audit: AuditReport) -> Table:
    """The requests that were solved together, or would have been."""
    solved = bool(audit.plan.delta.changes)
    head = (*HEAD, "Key leakage", "Neighbours", *(("P(new)", "P(old)", "Holds") if audit.outcomes else ()))
    rows = tuple(
        (*words_of(request), *_scores(row), *_outcome(outcome))
        for request, row, outcome in zip(
            audit.plan.requests, _rows(audit.plan, False), _outcomes(audit), strict=True
        )
    )
    caption = "What was asked" if solved else "What would have been solved"
    numeric = frozenset(range(3, min(len(head), 7)))
    return Table(caption, head, rows[:SHOWN], numeric, note=left_out(len(rows), SHOWN))


def left_out_table(audit: AuditReport) -> Table:
    """The requests that the policy stops, and why."""
    rows = tuple(
        (*words_of(request), *_scores(row), visible(row.reason if row else ""))
        for request, row in zip(audit.plan.stopped, _rows(audit.plan, True), strict=True)
    )
    head = (*HEAD, "Key leakage", "Neighbours", "Why")
    caption = "Asked for and left out by the policy"
    return Table(caption, head, rows[:SHOWN], frozenset({3, 4}), note=left_out(len(rows), SHOWN))


def _rows(plan: Plan, stopped: bool) -> list[Screened | None]:
    """Screenings of the requests that were stopped or not, in their order; None where none is on record."""
    found: list[Screened | None] = [row for row in plan.screened if row.stopped is stopped]
    return found or [None] * len(plan.stopped if stopped else plan.requests)


def _outcomes(audit: AuditReport) -> list[RequestOutcome | None]:
    return list(audit.outcomes) or [None] * len(audit.plan.requests)


def _scores(row: Screened | None) -> tuple[str, str]:
    scores = row.scores if row else {}
    return tuple(_number(scores.get(name)) for name in ("key_leakage", "key_near_interference"))  # type: ignore[return-value]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _outcome(outcome: RequestOutcome | None) -> tuple[Cell, ...]:
    if outcome is None:
        return ()
    old = (outcome.p_old_before, outcome.p_old_after)
    moved = "unknown" if None in old else " → ".join(percent(p) for p in old if p is not None)
    sign = Sign("✓", "yes", "good") if outcome.holds else Sign("✗", "no", "bad")
    return (f"{percent(outcome.p_new_before)} → {percent(outcome.p_new_after)}", moved, sign)


def request_rows(audit: AuditReport) -> list[dict[str, Any]]:
    """A row for each request, for MLflow's table."""
    plan = audit.plan
    planned = zip(plan.requests, _rows(plan, False), _outcomes(audit), strict=True)
    rows = [_row(request, "planned", row, outcome) for request, row, outcome in planned]
    stopped = zip(plan.stopped, _rows(plan, True), strict=True)
    return rows + [_row(request, "stopped", row, None) for request, row in stopped]


def _row(
    request: EditRequest, state: str, row: Screened | None, outcome: RequestOutcome | None
) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "state": state,
        "subject": request.subject,
        "prompt": request.asked,
        "target_true": request.target_true,
        "target_new": request.target_new,
        "relation": request.relation,
        "reason": request.reason,
    }
    if row is not None:
        plain |= {"screening": row.reason, **row.scores}
    return plain | (outcome.model_dump(mode="json") if outcome else {})
