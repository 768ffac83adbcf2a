"""A plan solved again from the record comes out as it was; where it does not, that is seen, and nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
from pipeline_helpers import Home, home, request_of, run, world

from guardedit.errors import BadRequestError, IntegrityError, NotFoundError, StaleError
from guardedit.pipeline import reproducing
from guardedit.pipeline.reproducing import reproduce

__all__ = ["home", "world"]


def test_edits_come_out_bit_identical_on_the_versions_they_were_planned_on(home: Home) -> None:
    """The second stands on the first, the first is undone meanwhile: each is solved on the version it was made on."""
    guard = home.guard()
    plans = []
    for number, editor in enumerate(("rome", "finetune")):
        plans.append(guard.plan(request_of(number), editor).plan_id)
        assert guard.apply(plans[-1]).outcome == "committed"
    guard.rollback(plans[1])
    before = home.trace()
    for plan_id, version in zip(plans, ("base", "000001"), strict=True):
        found = reproduce(home.guard(), plan_id, 0.0)
        assert found["bit_identical"] and found["within_tolerance"] and found["same_delta_file"], found
        assert found["version"].startswith(version) and found["distance"] == 0.0
    assert home.trace() == before, "nothing is written"
    assert guard.handle.digest() == guard.store.digest()


@pytest.mark.parametrize("editor", ["memit", "alphaedit"])
def test_a_joint_plan_behind_another_comes_out_again(home: Home, editor: str) -> None:
    guard = home.guard()
    guard.apply(guard.plan(request_of(0)).plan_id)
    plan = guard.plan([request_of(1), request_of(2)], editor, hparams={"n_prefixes": 2})
    found = reproduce(home.guard(), plan.plan_id, 0.0)
    assert found["bit_identical"] and found["same_delta_file"], found


@pytest.mark.slow
def test_an_activation_edit_comes_out_again(home: Home) -> None:
    plan = home.guard().plan(request_of(0, context="fiction"), "contextual")
    found = reproduce(home.guard(), plan.plan_id, 0.0)
    assert found["bit_identical"], found


def test_another_solve_than_the_recorded_one_is_not_taken_for_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = home.guard().plan(request_of())
    solve = reproducing.EDITORS["rome"].solve

    def another(handle: Any, requests: Any, settings: Any, inputs: Any) -> Any:
        return solve(handle, requests, type(settings)(**{**vars(settings), "steps": 2}), inputs)

    editor = reproducing.EDITORS["rome"]
    monkeypatch.setitem(reproducing.EDITORS, "rome", type(editor)(**{**vars(editor), "solve": another}))
    found = reproduce(home.guard(), plan.plan_id)
    assert not found["within_tolerance"] and not found["bit_identical"] and found["distance"] > 1e-3
    assert reproduce(home.guard(), plan.plan_id, 1e9)["within_tolerance"]
    ran = home.run("--json", "reproduce", plan.plan_id, mlflow=None)
    assert ran.code == 6 and ran.json["within_tolerance"] is False
    assert "NOT REPRODUCED" in home.run("reproduce", plan.plan_id, mlflow=None).out


def test_what_cannot_be_solved_again_is_said(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    with pytest.raises(NotFoundError):
        reproduce(home.guard(), "0099-none")
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BadRequestError, match="tolerance"):
            reproduce(home.guard(), plan.plan_id, wrong)
    folder = home.folder / "plans" / plan.plan_id
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "delta.safetensors").write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="delta file was changed"):
        reproduce(home.guard(), plan.plan_id)


def test_other_statistics_than_the_plans_are_named(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    other = plan.model_copy(update={"delta": plan.delta.model_copy(update={
        "statistics_digests": {"second_moments/x": "sha256:" + "1" * 64}})})  # fmt: skip
    with pytest.raises(StaleError, match="second_moments/x"):
        reproducing._require_same_inputs(guard, other)


def test_reproduce_on_the_command_line(home: Home) -> None:
    plan = home.guard().plan(request_of())
    ran = home.run("reproduce", plan.plan_id, mlflow=None)
    assert ran.code == 0 and "bit-identical" in ran.out and "threads" in ran.out, ran.err
    assert run("--home", str(home.folder), "--json", "reproduce", plan.plan_id).json["bit_identical"]
