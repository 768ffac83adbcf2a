"""The table of levels by editor: one measure of harm, shares that add up."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.guard_levels import HEAD, harmful, shares

ROWS = pd.DataFrame({
    "out.far/kl_nats": [0.0, 0.1, 0.3, 0.0], "out.near/kl_nats": [0.0, 0.0, 0.0, 0.4],
    "out.subject/kl_nats": [1.0, 1.0, 1.0, 1.0],
})  # fmt: skip


def test_harm_in_any_scope_is_harm_and_the_limit_itself_is_none() -> None:
    assert harmful(ROWS, {"far": 0.1, "near": 0.2, "subject": 1.0}).tolist() == [False, False, True, True]


def test_shares_are_of_harmful_edits_and_of_the_others_apart() -> None:
    harm = {"far": 0.1, "near": 0.2, "subject": 2.0}
    told = dict(zip(HEAD[2:], shares(ROWS, np.array([True, False, True, False]), harm), strict=True))
    assert told == {
        "n": "4", "harmful": "2", "stopped": "0.50", "harmful ones stopped": "0.50", "others stopped": "0.50",
        "far avoided": "0.75", "near avoided": "0.00", "subject avoided": "0.50",
    }  # fmt: skip


def test_where_no_edit_does_harm_no_share_of_such_is_told() -> None:
    told = shares(ROWS, np.array([True, False, False, False]), {"far": 9.0, "near": 9.0, "subject": 9.0})
    assert told[:5] == ["4", "0", "0.25", "–", "0.25"]
