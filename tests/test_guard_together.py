"""Many edits in one model, as rows of the guard's benchmark: batches, and sequences as their sum."""

from __future__ import annotations

from pathlib import Path

import pytest
from guard_helpers import CASES
from pipeline_helpers import Home, home, request_of, world

from guardedit.edits.deltas import Dense, EditDelta, change_of, post_images, restore, saved
from guardedit.errors import BadRequestError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.guard.strata import Chosen
from guardedit.evaluation.guard.together import Together, run_together
from guardedit.evaluation.protocol import Protocol

__all__ = ["home", "world"]


def test_a_batch_is_a_row_that_leaves_the_model_alone_and_is_not_measured_again(
    home: Home, tmp_path: Path
) -> None:
    guard = home.guard()
    bench = Bench(guard, "emmet", Neighbours.of(CASES))
    edits = [Chosen("known", case) for case in CASES[:3]]
    before = guard.handle.digest()
    found = run_together(bench, edits, Together("emmet", Protocol(2)), tmp_path)
    assert [row["stratum"] for row in found] == ["batch of 2"]
    assert found[0]["error"] is None
    assert found[0]["outcomes"]["far/kl_nats"] > 0
    assert "hidden_cosine" not in found[0]["predictors"]
    assert guard.handle.digest() == before
    assert run_together(bench, edits, Together("emmet", Protocol(2)), tmp_path) == found


def test_a_sequence_of_edits_is_measured_as_their_sum_on_the_unedited_model(
    home: Home, tmp_path: Path
) -> None:
    guard = home.guard()
    bench = Bench(guard, "rome", Neighbours.of(CASES))
    edits = [Chosen("known", case) for case in CASES[:2]]
    before = guard.handle.digest()
    (row,) = run_together(bench, edits, Together("rome", Protocol(1, 2)), tmp_path)
    assert (row["stratum"], row["error"]) == ("sequence of 2", None)
    assert guard.handle.digest() == before
    # By hand: solve, write, solve on top, and take the difference of the weights.
    requests = tuple(bench.request(one.case) for one in edits)
    parameter = guard.handle.rewrite_parameter(bench.settings.layer)
    old = saved(guard.handle, [parameter])
    for number, request in enumerate(requests):
        delta = bench.solve((request,), requests[:number])
        restore(guard.handle, post_images(guard.handle, delta))
    moved = guard.handle.oriented(parameter).detach().double().clone()
    restore(guard.handle, old)
    total = Dense(moved - guard.handle.oriented(parameter).detach().double())
    by_hand = EditDelta((change_of(guard.handle, parameter, total),), "rome", {}, {})
    far = bench.far.moves(by_hand)
    assert row["outcomes"]["far/kl_nats"] == pytest.approx(far["kl_nats"], rel=1e-6)
    assert row["predictors"]["delta_norm_ratio"] > 0


def test_a_batch_holds_one_edit_a_subject_and_a_sequence_takes_them_as_they_come() -> None:
    names = ("France", "France", "Peru", "Chile", "Peru")
    edits = [
        Chosen("known", EvalCase(case_id=str(i), request=request_of(2, subject=who, target_true="Oslo")))
        for i, who in enumerate(names)
    ]

    def ids(protocol: Protocol) -> list[list[str]]:
        return [[one.case.case_id for one in group] for group in Together("emmet", protocol).groups(edits)]

    assert ids(Protocol(2)) == [["0", "2"], ["1", "3"]]
    assert ids(Protocol(1, 2)) == [["0", "1"], ["2", "3"]]


def test_batches_of_an_editor_of_single_facts_are_refused() -> None:
    with pytest.raises(BadRequestError, match="rome takes one fact at a time"):
        Together("rome", Protocol(10))
