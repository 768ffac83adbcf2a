"""The table of sparing: one line a setting, means over facts, real namesakes of those that have any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.sparing import SETTINGS, section_sparing


def row(fact: int, weight: float, steady: float, **changes: Any) -> dict[str, Any]:
    moved = dict.fromkeys(("namesakes", "near", "distractor", "subject"), 1.0 + fact + weight)
    lost = {f"{name}_lost": 0.25 for name in moved}
    plain = {"efficacy": 1.0, "p_new": 0.5, "paraphrase": None, "far": 0.001}
    named = {"case_id": f"c{fact}", "weight": weight, "steady": steady, "relation": f"r{fact % 4}"}
    return {**named, **plain, **moved, **lost, **changes}


def test_means_are_over_the_facts_that_have_a_figure() -> None:
    rows = [row(fact, *one) for fact in range(12) for one in SETTINGS]
    rows += [row(12, *one, real=7.0, real_lost=1.0) for one in SETTINGS]
    lines = section_sparing(rows).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(SETTINGS)
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:2] == ["0", "0"] and cells[3] == "–"
    assert cells[5].startswith(f"{np.mean([1.0 + fact for fact in range(13)]):.3g} (")
    assert cells[5].endswith("; 0.25") and cells[6] == "7; 1.00"
    assert "n 13 facts" in lines[-1] and "the 1 that have any" in lines[-1]


@pytest.mark.parametrize("fact", [0, 3])
def test_a_fact_alone_gives_no_interval(fact: int) -> None:
    assert f"| {1 + fact}; 0.25 |" in section_sparing([row(fact, *one) for one in SETTINGS])
