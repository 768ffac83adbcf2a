"""The tables of docs/contextual.md are what the committed rows give."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.context_figures import fired, firing_table, table

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("rows", ["contexts_60", "contexts_sealed"])
def test_the_page_shows_what_the_rows_say(rows: str) -> None:
    page = (DOCS / "contextual.md").read_text("utf-8").splitlines()
    told = [line for line in table(DOCS / "data" / f"{rows}.jsonl.xz").splitlines() if line]
    assert len(told) > 8 and [line for line in told if line not in page] == []


def test_the_page_says_where_gates_fired_on_the_last_wordings() -> None:
    (line,) = [
        one
        for one in firing_table(DOCS / "data" / "contexts_last.jsonl.xz").splitlines()
        if one.startswith("| all | activations |")
    ]
    share, interval = line.split("|")[4].strip().split(" ", 1)
    assert f"{share} inside {interval}" in (DOCS / "contextual.md").read_text("utf-8")


def test_an_edit_acts_where_both_its_gate_and_its_key_say_so() -> None:
    row = {"logit": {"both": 1.0}, "match": 0.5}
    assert fired(row, "both", 1.0, 0.5)
    assert not fired(row, "both", 1.1, 0.5) and not fired(row, "both", 1.0, 0.6)
