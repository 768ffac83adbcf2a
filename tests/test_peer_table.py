"""The race's table: costs are compared by method, on the facts that both sides solved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peer_table import costs, table


def line(label: str, case: str, seconds: float | None) -> dict[str, Any]:
    about = {"gflops": 90.0, "load": 1.0, "edit_cpu_s": seconds} if seconds is not None else {}
    scores = dict.fromkeys(
        ("efficacy", "paraphrase", "neighborhood", "distractor_neighborhood", "p_new"), 1.0
    )
    return {"label": label, "case": case, **scores, **about}


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def test_the_peers_cost_is_told_beside_ours_by_the_same_method_on_the_same_facts(tmp_path: Path) -> None:
    ours = [
        line("guardedit ROME, shared values", case, cost)
        for case, cost in (("a", 2.0), ("b", 4.0), ("c", 99.0))
    ]
    early = [line("guardedit ROME stopped at 0.2, shared values", case, 1.0) for case in "abc"]
    other = [line("guardedit MEMIT, shared values", case, 7.0) for case in "abc"]
    theirs = [line("EasyEdit ROME", case, 30.0) for case in "ab"]
    text = table(
        written(tmp_path / "race.jsonl", [line("unedited", "a", None), *ours, *early, *other, *theirs])
    )
    assert (
        "EasyEdit ROME, times the cost of ROME, shared values: 10.0; ROME stopped at 0.2, shared values: 30.0"
        in text
    )
    assert "The 2 facts that every method of EasyEdit was run on:" in text
    (alone,) = [one for one in text.splitlines() if one.startswith("| guardedit ROME stopped at 0.2")][:1]
    assert alone.endswith("| 1.0 | 0.2 |")


def test_ours_alone_is_a_table_without_a_peer(tmp_path: Path) -> None:
    text = table(written(tmp_path / "tune.jsonl", [line("guardedit ROME, shared values", "a", 2.0)]))
    assert "EasyEdit" not in text and "| guardedit ROME, shared values | 1 |" in text


def test_a_value_that_was_found_before_is_paid_for() -> None:
    kept = dict.fromkeys(("wall_s", "rss_mib", "gflops", "load", "steps"), 0)
    row = {
        "label": "guardedit MEMIT, one batch",
        "cases": ["a", "b"],
        "cpu_s": 4.0,
        "values_cpu_s": 3.0,
        **kept,
    }
    (found,) = costs([row])
    assert {case: one["edit_cpu_s"] for case, one in found.items()} == {"a": 5.0, "b": 5.0}
