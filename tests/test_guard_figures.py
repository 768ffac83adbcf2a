"""The table of the guard's benchmark reads back as it was, and its figures are those of the textbooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from guard_helpers import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from guardedit.errors import BadRequestError
from guardedit.evaluation.guard.association import auroc_worst, figure, gain, spearman
from guardedit.evaluation.guard.findings import avoided, combined_risk
from guardedit.evaluation.guard.frames import read_rows, rows_digest, write_rows

__all__ = ["rows"]


# -- the table


def test_the_table_reads_back_as_it_was_and_its_digest_knows_no_seconds_and_no_order(
    rows: pd.DataFrame, tmp_path: Path
) -> None:
    write_rows(rows, tmp_path / "a.parquet")
    again = read_rows(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(rows, again)
    assert rows_digest(again.assign(seconds=1.0)) == rows_digest(rows)
    assert rows_digest(again.assign(subject="x")) != rows_digest(rows)
    later = again.assign(**{"pred.of_later_rows": np.nan})
    assert rows_digest(later) == rows_digest(rows) != rows_digest(later.fillna({"pred.of_later_rows": 1.0}))


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="no table"):
        read_rows(tmp_path / "none.parquet")
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadRequestError, match="no parquet table"):
        read_rows(tmp_path / "odd.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(BadRequestError, match="'editor'"):
        read_rows(tmp_path / "other.parquet")


# -- statistics


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=20, max_size=60))
@settings(max_examples=60, deadline=None)
def test_rank_statistics_are_those_of_the_libraries(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if x.std() and y.std():
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    worst = y > np.quantile(y, 0.9)
    if worst.any() and not worst.all():
        assert auroc_worst(x, y) == pytest.approx(roc_auc_score(worst, x))


def test_an_interval_resamples_whole_groups() -> None:
    x = np.arange(40.0)
    one_group_each = figure(spearman, x, x + np.tile([0, 9], 20), np.arange(40))
    one_group = figure(spearman, x, x + np.tile([0, 9], 20), np.zeros(40))
    assert one_group_each and one_group
    assert one_group.low == one_group.high == pytest.approx(one_group.value)
    assert one_group_each.low < one_group_each.value < one_group_each.high
    same = gain(spearman, x, x, x[::-1].copy(), np.arange(40))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_stopping_avoids_between_chance_and_the_oracle() -> None:
    damage = np.exp(np.random.default_rng(0).normal(size=50))
    assert avoided(damage, damage)[0] == 0
    assert avoided(damage, damage)[-1] == pytest.approx(1)
    some = combined_risk({"far": np.log(damage), "near": np.random.default_rng(1).normal(size=50)})
    assert (avoided(damage, damage) >= avoided(some, damage) - 1e-12).all()
