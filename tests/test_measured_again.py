"""Scores measured again are a plan's own, and the table keeps everything else."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from guard_helpers import made_rows

from benchmarks.measured_again import measured_rows, subject_scores, taken_over
from benchmarks.outcome_noise import KEYS
from guardedit.evaluation.guard.frames import PRED, rows_digest
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.risk.rehearsal import rehearse
from tests.risk_helpers import TOWER, world

NAMES = ("rehearsed_subject_kl", "rehearsed_subject_lost_top1")


def again(frame: pd.DataFrame, kl: float) -> pd.DataFrame:
    return frame[KEYS].assign(**{f"{PRED}{NAMES[0]}": kl, f"{PRED}{NAMES[1]}": 0.5})


def test_scores_are_those_that_a_plan_holds(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    planned = {
        PRED + one.name: one.value for one in rehearse(ctx, [TOWER], delta).scores if one.name in NAMES
    }
    assert subject_scores(tiny_llama, TOWER, delta) == pytest.approx(planned, rel=1e-4)
    assert min(planned.values()) > 0


def test_only_what_was_measured_again_changes() -> None:
    frame = made_rows(n=40, relations=4)
    found = taken_over(frame, again(frame.iloc[:10], 0.125))
    assert list(found["pred.rehearsed_subject_kl"][:10]) == [0.125] * 10
    pd.testing.assert_frame_equal(found.iloc[10:][frame.columns], frame.iloc[10:])
    rest = [name for name in frame.columns if "rehearsed_subject" not in name]
    assert rows_digest(found[rest]) == rows_digest(frame[rest])


def test_an_edit_that_the_table_does_not_have_is_refused() -> None:
    frame = made_rows(n=40, relations=4)
    strange = again(frame.iloc[:3], 0.1).assign(case_id="no-such-case")
    with pytest.raises(SystemExit, match="no-such-case"):
        taken_over(frame, strange)


def test_damage_far_from_the_edit_comes_with_the_text_that_it_was_measured_on(tmp_path: Path) -> None:
    for what, header in (("far", {"far": "sha256:a"}), ("subject", {"sentences": 32})):
        file = RowFile(tmp_path / f"rome-{what}-again.jsonl", header)
        file.append({"editor": "rome", "stratum": "known", "case_id": "0000", "out.far/kl_nats": 0.5})
    far, subject = (measured_rows(tmp_path / f"rome-{what}-again.jsonl") for what in ("far", "subject"))
    assert far["far_text"].tolist() == ["sha256:a"] and "far_text" not in subject
    found = taken_over(made_rows(n=40, relations=4), far)
    assert found["far_text"].notna().sum() == 1 and found["out.far/kl_nats"].iloc[0] == 0.5
