"""Latents that drift, as an outcome: edits are counted once, leaks not at all, and a score that decides it is found."""

from __future__ import annotations

import pandas as pd
from guard_helpers import made_rows

from benchmarks.drifted_latents import counted, section_drifted


def monitored(rows: pd.DataFrame) -> pd.DataFrame:
    """The monitor's rows of these edits, where as many latents drift as `leakage_share` orders."""
    ranks = rows["pred.leakage_share"].rank()
    counts = {f"score.drifted_latents_{scope}": ranks for scope in ("far", "near", "subject")}
    return pd.DataFrame({"kind": "mild", "case_id": rows["case_id"], "scope": "", "share": 0.0, **counts})


def test_an_edit_counts_once_and_leaks_and_shams_not_at_all() -> None:
    rows = made_rows(20)
    mild = monitored(rows)
    more = [
        mild.head(3).assign(kind="harmful"),
        mild.head(4).assign(scope="python"),
        mild.head(2).assign(kind="sham"),
    ]
    found = counted(pd.concat([mild, *more], ignore_index=True), rows)
    assert sorted(found["case_id"]) == sorted(rows["case_id"])
    assert set(found["kind"]) == {"mild"}


def test_the_score_that_orders_the_drift_is_named_first() -> None:
    rows = made_rows(60)
    for line in section_drifted(monitored(rows), rows).splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == "60" and cells[2].startswith("30 (")
        assert cells[4].startswith("`leakage_share` 1.00 (1.00 to 1.00); ")
