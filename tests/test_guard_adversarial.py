"""Edits that should not be proposed: what the table says of them is what the shipped model and policy say."""

from __future__ import annotations

import pandas as pd
import pytest
from guard_helpers import TABLE

from benchmarks.guard_adversarial import HEAD, section_adversarial
from guardedit.evaluation.guard.adversarial import KINDS
from guardedit.evaluation.guard.frames import OUT, read_rows


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rows = read_rows(TABLE)
    return rows[rows["editor"] == "rome"]


def lines_of(frame: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Kind -> its line, by column."""
    found = {}
    for line in section_adversarial(frame).splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[1]] = dict(zip(HEAD, cells, strict=True))
    return found


def test_every_kind_has_a_line_and_the_last_one_holds_them_all(frame: pd.DataFrame) -> None:
    found = lines_of(frame)
    assert list(found) == ["natural", *KINDS, "all of these"]
    assert sum(int(found[kind]["n"]) for kind in KINDS) == int(found["all of these"]["n"]) == 60
    for kind in KINDS:
        damage = frame[frame["stratum"] == kind][f"{OUT}far/kl_nats"].median()
        assert found[kind]["far, median nats"] == f"{damage:.2g}"


def test_where_the_model_has_no_opinion_a_person_is_asked(frame: pd.DataFrame) -> None:
    some = frame.copy()
    odd = some["stratum"] == "strong-belief"
    some.loc[odd, [name for name in some.columns if name.startswith("pred.") and "leak" in name]] = 1e9
    line = lines_of(some)["strong-belief"]
    assert line["no opinion"] == line["a person is asked"] == "1.00"


def test_harm_is_damage_above_what_the_model_calls_so(frame: pd.DataFrame) -> None:
    outcomes = [f"{OUT}{scope}/kl_nats" for scope in ("far", "near", "subject")]
    mild, bad = frame.copy(), frame.copy()
    odd = frame["stratum"] == "first-token"
    mild.loc[odd, outcomes], bad.loc[odd, outcomes] = 0.0, 99.0
    assert lines_of(mild)["first-token"]["harmful"] == "0.00"
    assert lines_of(mild)["first-token"]["of the harmful"] == "–"
    assert lines_of(bad)["first-token"]["harmful"] == "1.00"
