"""The monitor's own benchmark: leaks come to the size that is asked for, and the tables count what they say."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks.monitor_findings import SCOPES, alarms, detections
from benchmarks.planted_leaks import bisected, both
from guardedit.drift.null import BankEntry, NullBank
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange

BANK = NullBank(
    model_digest="sha256:" + "0" * 64, layer=0, hook_names=("blocks.0.hook_mlp_out",), far_tokens=64,
    entries=tuple(
        BankEntry(
            name=str(i), kind="real", accepted=True, statistics=dict.fromkeys(SCOPES.values(), 0.001 * (i + 1))
        )
        for i in range(20)
    ),
)  # fmt: skip


def _row(
    scope: str = "", share: float = 0.0, broken: str = "", kind: str = "mild", **kl: float
) -> dict[str, object]:
    scores = {f"score.{name}": kl.get(where, 0.001) for where, name in SCOPES.items()}
    outcome = "rolled-back" if broken else "committed"
    return {
        "kind": kind,
        "case_id": "1",
        "scope": scope,
        "share": share,
        "outcome": outcome,
        "broken": broken,
    } | {"score.perplexity_ratio": 1.0, "score.sae_validity": 1.0, **scores}


def _delta(size: float) -> EditDelta:
    update = LowRank(torch.full((3, 1), size, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    return EditDelta((WeightChange("w", 0, update),), "planted", {"size": size}, {})


@pytest.mark.parametrize("share", (0.01, 0.05, 0.5))
def test_a_leak_comes_to_the_share_that_is_asked_for(share: float) -> None:
    made, came = bisected(lambda size: (_delta(size), min(1.0, size / 10)), share)
    assert came == pytest.approx(share, rel=0.12)
    assert made.hparams["size"] == pytest.approx(10 * share, rel=0.12)


def test_carrier_and_leak_are_one_update_that_is_their_sum() -> None:
    (change,) = both(_delta(2.0), _delta(3.0)).changes
    assert isinstance(change, WeightChange) and isinstance(change.update, LowRank)
    assert torch.equal(change.update.left @ change.update.right, torch.full((3, 2), 5.0, dtype=torch.float64))


def test_what_the_carrier_breaks_by_itself_is_no_detection_and_the_subjects_own_rules_are_none() -> None:
    table = pd.DataFrame(
        [
            _row(broken="perplexity-ratio"),
            _row("python", 0.01, "perplexity-ratio subject-lost-top1"),
            _row("python", 0.02, "perplexity-ratio far-kl", python=0.5, chat=0.0005),
        ]
    )
    small, large = detections(table, BANK).splitlines()[2:]
    assert small.split("|")[6:8] == [" 0 of 1 ", " 0 of 1 "]
    assert large.split("|")[4:9] == [" 0.0010 → 0.5000 ", " 0.0000 ", *[" 1 of 1 "] * 3]


def test_a_leak_that_moves_another_domain_more_is_not_named() -> None:
    table = pd.DataFrame([_row(), _row("python", 0.02, "far-kl", python=0.5, chat=0.6)])
    assert detections(table, BANK).splitlines()[2].split("|")[8] == " 0 of 1 "


def test_alarms_are_counted_apart_for_real_edits_and_shams() -> None:
    calm = [_row(), _row(broken="far-kl"), _row(python=0.03), _row(kind="sham")]
    # A rise that the limits before did not allow.
    calm[0]["score.perplexity_ratio"] = 1.012
    real, sham = alarms(pd.DataFrame(calm), BANK).splitlines()[2:]
    assert [cell.strip().split(" ")[0] for cell in real.split("|")[2:6]] == ["3", "0.33", "0.67", "0.33"]
    assert "`far-kl`" in real and "0.00" in sham
