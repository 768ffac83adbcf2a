"""A plan made anew: what is different is told, and what did not get worse is quick to review."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pipeline_helpers import HARD, SOFT, UNDECIDED, Home, home, request_of, world

from guardedit.errors import BadRequestError, BlockedError, NotFoundError, SolveError, StaleError
from guardedit.pipeline import Guard, replanning
from guardedit.pipeline.replanning import due, settings_of
from guardedit.pipeline.reviewing import difference_of, successor
from guardedit.pipeline.trying import HOOK, HOOK_ELSEWHERE, STAGED, continued, tried

__all__ = ["home", "world"]

REASON = "looked at it: the tests want it"


def test_a_plan_made_anew_on_the_same_model_is_the_same_edit_and_says_so(home: Home) -> None:
    guard = home.guard(SOFT)
    hparams = {"steps": 4, "learning_rate": 0.4, "contexts": ["", "It is said that. "]}
    old = guard.plan(request_of(), hparams=hparams)
    (found,) = home.guard(SOFT).replan(old.plan_id)
    assert found.new is not None and found.new.delta.file_digest == old.delta.file_digest
    assert found.new.delta.hparams == old.delta.hparams and found.new.requests == old.requests
    told = found.difference
    assert told["delta"] == {"distance": 0.0, "cosine": pytest.approx(1.0), "identical": True}
    assert told["not_worse"] and told["scores"] == [] and told["verdicts"] == []
    assert guard.state(old.plan_id) == "superseded" and guard.state(found.new.plan_id) == "needs-approval"
    assert successor(guard, old.plan_id) == found.new.plan_id
    assert difference_of(guard, found.new.plan_id) == told


def test_a_stale_plan_is_made_anew_on_todays_model_with_what_moved(home: Home) -> None:
    guard = home.guard(SOFT)
    old, first = guard.plan(request_of(0)), guard.plan(request_of(1))
    guard.approve(first.plan_id, REASON)
    guard.apply(first.plan_id)
    assert due(guard) == [old.plan_id]
    (found,) = guard.replan()
    assert found.new is not None and found.new.model_digest == guard.store.digest() != old.model_digest
    told = found.difference
    assert told["old_state"] == "stale" and "the model" in told["because"][0]
    assert told["delta"]["distance"] > 0 and not told["delta"]["identical"]
    assert guard.replan() == ()
    guard.approve(found.new.plan_id, REASON)
    assert guard.apply(found.new.plan_id).outcome == "committed"


def test_what_got_worse_is_called_so(home: Home) -> None:
    old = home.guard().plan(request_of())
    strict = home.guard(HARD)
    assert due(strict) == [old.plan_id], "another policy"
    (found,) = strict.replan()
    told = found.difference
    assert told["outcome"] == {"before": "auto-approved", "after": "blocked"} and not told["not_worse"]
    assert told["because"] == ["the policy"]
    assert {row["after"] for row in told["verdicts"]} == {"fail"}


def test_an_expired_plan_is_made_anew_and_a_rejected_one_is_not(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(SOFT)
    expired, rejected = guard.plan(request_of(0)), guard.plan(request_of(1))
    guard.approve(expired.plan_id, REASON)
    guard.reject(rejected.plan_id, REASON)
    later = guard.now() + timedelta(hours=73)
    monkeypatch.setattr(Guard, "now", lambda _: later)
    with pytest.raises(StaleError):
        guard.apply(expired.plan_id)
    (found,) = guard.replan()
    assert found.old == expired.plan_id and found.difference["old_state"] == "expired"
    before = home.trace()
    with pytest.raises(BlockedError):
        guard.replan(rejected.plan_id)
    with pytest.raises(NotFoundError):
        guard.replan("0009-nothing")
    assert home.trace() == before


def test_a_plan_that_cannot_be_solved_any_more_stays_and_says_why(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())

    def fails(*_: Any) -> None:
        raise SolveError("no solution")

    monkeypatch.setattr(replanning, "make_plan", fails)
    (found,) = guard.replan(plan.plan_id)
    assert found.new is None and str(found.problem) == "no solution"
    assert guard.state(plan.plan_id) == "needs-approval"


def test_a_plan_that_was_decided_while_it_was_made_anew_is_not_replaced(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    make = replanning.make_plan

    def meanwhile(*args: Any) -> Any:
        home.guard(SOFT).reject(plan.plan_id, REASON)
        return make(*args)

    monkeypatch.setattr(replanning, "make_plan", meanwhile)
    (found,) = guard.replan(plan.plan_id)
    assert found.new is None and isinstance(found.problem, BlockedError)
    assert guard.states() == {plan.plan_id: "rejected"}


def test_a_crash_between_the_new_plan_and_the_word_on_the_old_one_is_put_right(home: Home) -> None:
    guard = home.guard(SOFT)
    old = guard.plan(request_of())
    append, told = guard.ledger.append, []

    def until_superseded(kind: str, body: Any, *rest: Any) -> Any:
        if kind == "superseded":
            raise KeyboardInterrupt
        told.append(kind)
        return append(kind, body, *rest)

    guard.ledger.append = until_superseded  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        guard.replan(old.plan_id)
    after = home.guard(SOFT)
    assert told == ["planned"] and after.state(old.plan_id) == "needs-approval"
    with pytest.raises(StaleError, match="superseded"):
        after.approve(old.plan_id, REASON)


@pytest.mark.parametrize("editor", ["lora", "memit"])
def test_settings_of_a_plan_are_those_it_was_solved_with(home: Home, editor: str) -> None:
    guard = home.guard()
    plan = guard.plan(request_of(), editor, hparams={"steps": 2, "layers": [1], "learning_rate": 1e-3})
    (found,) = guard.replan(plan.plan_id)
    assert found.new is not None and found.new.delta.hparams == plan.delta.hparams
    assert settings_of(plan)["learning_rate"] == 1e-3
    assert found.difference["delta"]["identical"]


def test_a_plan_is_tried_from_its_staged_copy_where_there_is_one(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    plan, other = guard.plan(request_of(0)), home.guard().plan(request_of(1))
    prompt = request_of(0).filled
    hooked = tried(guard, plan.plan_id, prompt, 4)
    guard.apply(plan.plan_id)
    staged = tried(guard, plan.plan_id, prompt, 4)
    assert (hooked.source, staged.source) == (HOOK, STAGED)
    assert staged.before == hooked.before == continued(guard.handle, prompt, 4)
    assert guard.handle.digest() == plan.model_digest
    with guard.staged(plan.plan_id) as copy:
        assert staged.after == continued(copy, prompt, 4)
    sure = home.guard()
    sure.apply(other.plan_id)
    with pytest.raises(StaleError, match="live already"):
        tried(sure, other.plan_id, prompt, 4)
    late = sure.plan(request_of(2))
    sure.rollback(other.plan_id)
    assert tried(sure, late.plan_id, prompt, 2).source == HOOK_ELSEWHERE


def test_an_unknown_plan_cannot_be_tried(home: Home) -> None:
    home.guard().plan(request_of())
    with pytest.raises((NotFoundError, BadRequestError)):
        tried(home.guard(), "0007-none", "x", 1)
