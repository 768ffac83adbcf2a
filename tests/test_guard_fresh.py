"""A risk model on edits that it was not fitted on: which those are, and that its words are taken as said."""

from __future__ import annotations

import numpy as np
import pytest
from guard_helpers import made_rows

from benchmarks.guard_fresh import first_model, fresh_edits, said_of, section_fresh
from guardedit.evaluation.guard.calibrating import calibrated
from guardedit.risk.calibration import RiskModel


@pytest.fixture(scope="module")
def model() -> RiskModel:
    rows = made_rows(120)
    meant = {"pred.rehearsed_near_kl": rows["pred.near_interference"]}
    return calibrated(rows.assign(**meant), "tiny", "rome", (1,))[0]


def test_fresh_is_what_was_not_fitted() -> None:
    rows = made_rows(30)
    fitted = rows["case_id"].head(12).tolist()
    assert fresh_edits(rows, fitted)["case_id"].tolist() == rows["case_id"][12:].tolist()
    assert section_fresh(rows, rows["case_id"].tolist()) == "None yet.\n"


def test_the_model_of_the_first_edits_has_not_seen_the_others() -> None:
    rows = made_rows(160).assign(**{"pred.rehearsed_near_kl": lambda frame: frame["pred.near_interference"]})
    first = rows["case_id"].head(90).tolist()
    changed = rows.assign(
        **{"out.far/kl_nats": rows["out.far/kl_nats"].where(rows["case_id"].isin(first), 9.0)}
    )
    assert first_model(changed, first) == first_model(rows, first)
    assert first_model(rows, first).scopes[0].n == 90


def test_each_line_holds_the_models_own_words_on_the_fresh_edits(model: RiskModel) -> None:
    rows = made_rows(80, seed=5)
    rows = rows.assign(**{"pred.rehearsed_near_kl": rows["pred.near_interference"]})
    fitted = rows["case_id"].head(20).tolist()
    said = said_of(model, fresh_edits(rows, fitted))
    lines = section_fresh(rows, fitted, model).splitlines()[2:]
    for at, scope in enumerate(model.scopes):
        cells = [cell.strip() for cell in lines[at].strip("|").split("|")]
        unsaid = sum(one[at].value is None for one in said)
        assert cells[:3] == [scope.scope, str(60 - unsaid), str(unsaid)]
        damage = fresh_edits(rows, fitted)[f"out.{scope.outcome}"].to_numpy()
        inside = [
            one[at].low <= d <= one[at].high  # type: ignore[operator]
            for one, d in zip(said, damage, strict=True)
            if one[at].value is not None
        ]
        assert cells[5].startswith(f"{np.mean(inside):.2f} (")


def test_an_edit_without_an_opinion_is_stopped_first(model: RiskModel) -> None:
    rows = made_rows(20, seed=2)
    rows = rows.assign(**{"pred.rehearsed_near_kl": rows["pred.near_interference"]})
    worst = rows["out.far/kl_nats"].idxmax()
    column = next(f"pred.{t.score}" for t in model.scopes[0].terms if t.weight > 0)
    rows.loc[worst, column] = 1e9
    rows.loc[worst, "out.far/kl_nats"] = 1e9
    lines = section_fresh(rows, [], model).splitlines()
    (told,) = [line for line in lines if line.startswith("Stopping the 4 of 20")]
    assert "far 1.00 (an oracle 1.00)" in told
    assert [line.split("`")[1] for line in lines[-3:]] == ["strict", "standard", "permissive"]
    # No limit can be checked by scores that these rows lack: a person is asked wherever such a limit binds.
    assert all(line.split("|")[2].strip() == "1.00" for line in lines[-3:-1])
