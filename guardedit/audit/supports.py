"""What a report can be used for: questions that rules and frameworks ask, and the section that helps to answer each.

"Supports", never "complies": a record answers questions about what was done; others say whether a duty is met.
"""

from __future__ import annotations

from collections.abc import Mapping

from guardedit.audit.sheet import Cell, Link, Section, Table

_LEAD = (
    "This report supports answers to the questions below; it does not say that any rule is met, and it is no legal "
    "advice. Sources are named as they stood in November 2026; read the text in force.",
    "Dates: duties for high-risk systems under the EU AI Act were put off by Regulation (EU) 2026/1744, to 2 December "
    "2027 for the uses of Annex III and to 2 August 2028 for products of Annex I.",
)
_HEAD = ("Asked by", "Question", "Section that supports an answer")
Row = tuple[str, str, str]
"""Who asks, what, and the anchor of the section."""

_EDIT: tuple[Row, ...] = (
    ("EU AI Act, Art. 12", "Is a substantial modification recorded when it happens?", "versions"),
    ("EU AI Act, Art. 12", "Does the record show situations of risk?", "limits"),
    ("EU AI Act, Art. 14 and 26", "Who could step in, and who did?", "people"),
    ("EU AI Act, Annex IV, 2(a)", "How was a model that others trained changed?", "fact"),
    ("EU AI Act, Annex IV, 2(g)", "Which tests were run, when, and with what result?", "drift"),
    ("NIST AI RMF, Map", "What is the change for?", "fact"),
    ("NIST AI RMF, Measure", "What was measured, how surely, and what was not?", "unmeasured"),
    ("NIST AI RMF, Manage", "What is done when it goes wrong?", "versions"),
    ("NIST AI RMF, Govern", "Who decided, and by which policy?", "people"),
    ("Model card", "What was evaluated, before and after?", "drift"),
    ("Model card", "Which side effects are known?", "disturbance"),
    ("Any reviewer", "Can this be measured again?", "provenance"),
)
_PERIOD: tuple[Row, ...] = (
    ("EU AI Act, Art. 12", "Which substantial modifications were there?", "edits"),
    ("EU AI Act, Art. 12", "Which situations of risk were noticed?", "incidents"),
    ("EU AI Act, Art. 12 and 72", "What shows over time that the model drifts?", "lineage"),
    ("EU AI Act, Art. 14 and 26", "Who could step in, and who did?", "decisions"),
    ("EU AI Act, Art. 18, 19 and 26", "What has to be kept, and is it whole?", "chain"),
    ("EU AI Act, Annex IV, 6", "What changed through the lifecycle?", "edits"),
    ("EU AI Act, Annex IV, 2(f)", "Which changes were planned, and under which policy?", "open"),
    ("NIST AI RMF, Measure", "How does the sum of all edits compare with its limits?", "lineage"),
    ("NIST AI RMF, Manage", "Which incidents were there, and how did they end?", "incidents"),
    ("NIST AI RMF, Govern", "Which limits were lifted, by whom and why?", "overrides"),
    ("Model card", "Which facts of the live model were edited?", "facts"),
    ("Any reviewer", "Can this be checked without the people who wrote it?", "chain"),
)


def of_an_edit(titles: Mapping[str, str]) -> Section:
    """The section of one edit's report; `titles` names its other sections by anchor."""
    return _section(_EDIT, titles)


def of_a_period(titles: Mapping[str, str]) -> Section:
    """The section of a report over a period."""
    return _section(_PERIOD, titles)


def _section(rows: tuple[Row, ...], titles: Mapping[str, str]) -> Section:
    lines: tuple[tuple[Cell, ...], ...] = tuple(
        (asker, question, Link(anchor, titles[anchor]))
        for asker, question, anchor in rows
        if anchor in titles
    )
    return Section(
        "supports", "What this supports", _LEAD, tables=(Table("Questions and sections", _HEAD, lines),)
    )
