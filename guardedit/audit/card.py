"""A fragment for a model card: which facts of the live model were edited, and what is known about it."""

from __future__ import annotations

from guardedit.audit.period import Evidence, LiveFact
from guardedit.audit.period_tables import counted, one_fact, side_effects
from guardedit.audit.report import markdown_cell, markdown_text
from guardedit.audit.sheet import Cell, Code
from guardedit.audit.words import percent, visible, when

_HEAD = ("Fact", "Asked as", "P(new) before", "P(new) after", "Measured elsewhere", "Editor", "Edit", "Why")


def model_card(evidence: Evidence, evidence_digest: str) -> str:
    """Markdown, one fact a line, with no heading of the first level: it goes into a card that has one."""
    lines = ["## Edited facts", "", _lead(evidence), ""]
    if evidence.facts:
        lines += [_row(_HEAD), _row(("---",) * len(_HEAD), plain=True)]
        lines += [_row(_cells(fact)) for fact in evidence.facts]
        lines += ["", "P is the probability of the whole new answer at the prompt it is asked by. What was measured "
                  "elsewhere belongs to the whole edit; a monitor sees what its probes ask."]  # fmt: skip
    lines += ["", "### Lineage of the edits", "", *_lineage(evidence), f"- evidence: `{evidence_digest}`", ""]
    return "\n".join(lines)


def _lead(evidence: Evidence) -> str:
    until = f" on {when(evidence.until)}" if evidence.until else ""
    edits = len({fact.plan_id for fact in evidence.facts})
    return markdown_text(
        f"{counted(len(evidence.facts), 'fact')} of {visible(evidence.model)} stood edited{until}, by "
        f"{counted(edits, 'edit')} that guardedit planned, judged and monitored."
    )


def _cells(fact: LiveFact) -> tuple[Cell, ...]:
    return (
        one_fact(fact.request),
        visible(fact.request.asked),
        "not measured" if fact.p_new_before is None else percent(fact.p_new_before, 4),
        "not measured" if fact.p_new_after is None else percent(fact.p_new_after, 4),
        side_effects(fact),
        fact.editor,
        Code(fact.plan_id),
        visible(fact.request.reason or "none given"),
    )


def _row(cells: tuple[Cell, ...], *, plain: bool = False) -> str:
    return "| " + " | ".join(str(c) if plain else markdown_cell(c) for c in cells) + " |"


def _lineage(evidence: Evidence) -> list[str]:
    return [
        f"- base model: `{evidence.base_digest or 'none'}`",
        f"- live model: `{evidence.live_digest or 'none'}`",
        f"- ledger: entry {evidence.chain.head_seq}, `{evidence.chain.head_digest or 'none'}`",
    ]
