"""What lets an edit through on a tiny model: the policy, people's words, waivers, the monitor."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pipeline_helpers import HARD, HARMFUL, SOFT, UNDECIDED, Home, home, request_of, world

from guardedit.errors import BadRequestError, BlockedError, HeldError, NeedsApprovalError, StaleError
from guardedit.gate.approvals import make_waiver
from guardedit.pipeline import Guard

__all__ = ["home", "world"]

REASON = "looked at it: the tests want it"


def test_a_blocked_plan_cannot_be_applied_or_approved(home: Home) -> None:
    guard = home.guard(HARD)
    plan = guard.plan(request_of())
    assert plan.judgement.outcome == "blocked"
    before = home.trace()
    for step in (guard.apply, lambda name: guard.approve(name, REASON)):
        with pytest.raises(BlockedError):
            step(plan.plan_id)
    assert home.trace() == before
    assert guard.report(plan.plan_id).audit.outcome == "blocked"


def test_a_plan_that_needs_approval_is_applied_once_a_person_has_approved_its_digest(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    with pytest.raises(NeedsApprovalError, match="guardedit approve"):
        guard.apply(plan.plan_id)
    word = guard.approve(plan.plan_id, REASON)
    assert word.plan_digest == plan.digest and word.outcome == "approved"
    assert home.guard(SOFT).apply(plan.plan_id).outcome == "committed"


def test_an_approval_of_another_plan_counts_for_nothing(home: Home) -> None:
    guard = home.guard(SOFT)
    plan, other = guard.plan(request_of(0)), guard.plan(request_of(1))
    word = guard.approve(other.plan_id, REASON)
    body = {"event": "approve", "plan_id": plan.plan_id, "edit_id": plan.plan_id}
    guard.ledger.append("decided", {**body, "decision": word.model_dump(mode="json")})
    with pytest.raises(StaleError, match="the approval is for plan"):
        guard.apply(plan.plan_id)
    assert guard.store.digest() == plan.model_digest


def test_an_approval_expires(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    guard.approve(plan.plan_id, REASON)
    later = guard.now() + timedelta(hours=73)
    monkeypatch.setattr(Guard, "now", lambda _: later)
    with pytest.raises(StaleError, match="expired"):
        guard.apply(plan.plan_id)
    assert guard.state(plan.plan_id) == "expired"
    with pytest.raises(StaleError, match="guardedit replan"):
        guard.approve(plan.plan_id, REASON)


def test_a_rejected_plan_stays_rejected(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    guard.reject(plan.plan_id, REASON)
    for step in (guard.apply, lambda name: guard.approve(name, REASON)):
        with pytest.raises(BlockedError, match="rejected"):
            step(plan.plan_id)


def test_a_word_without_a_reason_is_no_word(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    before = home.trace()
    with pytest.raises(BadRequestError, match="reason"):
        guard.approve(plan.plan_id, "  ")
    assert home.trace() == before


def waiver(guard: Guard, metric: str = "preop/delta_norm_ratio", expires: str = "8h") -> Any:
    return make_waiver(metric, guard.user, REASON, expires, guard.now())


def test_a_waiver_lifts_a_soft_limit_on_record_and_replaces_the_plan(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    made = guard.waive(plan.plan_id, [waiver(guard)])
    assert made.judgement.outcome == "auto-approved" and guard.state(plan.plan_id) == "superseded"
    assert made.delta == plan.delta and made.digest != plan.digest
    entry = guard.plan_entry(made.plan_id)
    assert entry.body["waivers"][0]["author"] == guard.user and entry.body["waivers"][0]["reason"] == REASON
    with pytest.raises(StaleError, match="superseded"):
        guard.apply(plan.plan_id)
    assert guard.apply(made.plan_id).outcome == "committed"
    assert guard.report(plan.plan_id).audit.outcome == "superseded"


def test_a_hard_limit_cannot_be_waived(home: Home) -> None:
    guard = home.guard(HARD)
    with pytest.raises(BadRequestError, match="only soft rules can be waived"):
        guard.plan(request_of(), waivers=[waiver(guard)])
    assert not home.folder.exists()


def test_a_plan_that_rests_on_a_waiver_waits_for_no_one_after_it_expired(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of(), waivers=[waiver(guard, expires="1h")])
    assert plan.judgement.outcome == "auto-approved"
    later = guard.now() + timedelta(hours=2)
    monkeypatch.setattr(Guard, "now", lambda _: later)
    with pytest.raises(StaleError, match="rests on a waiver"):
        guard.apply(plan.plan_id)
    assert guard.store.digest() == plan.model_digest


def test_what_the_monitor_refuses_never_goes_live(home: Home) -> None:
    guard = home.guard(HARMFUL)
    plan = guard.plan(request_of())
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "rolled-back" and audit.postop is not None and audit.postop.verdict == "fail"
    assert audit.digest_after == plan.model_digest == guard.handle.digest()
    assert audit.digest_staged not in (None, plan.model_digest)
    assert not guard.store.staged_ids() and guard.verify()["versions"] == 0


def test_what_the_monitor_cannot_decide_is_held_until_somebody_does(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    plan = guard.plan(request_of())
    assert guard.apply(plan.plan_id).outcome == "held"
    assert guard.store.digest() == plan.model_digest
    with pytest.raises(HeldError):
        guard.apply(plan.plan_id)
    word = guard.approve(plan.plan_id, REASON)
    assert word.drift_digest is not None
    audit = home.guard(UNDECIDED).apply(plan.plan_id)
    assert audit.outcome == "committed" and audit.drift is not None
    assert home.guard(UNDECIDED).handle.digest() == audit.digest_staged


def test_a_held_edit_that_is_rejected_is_dropped(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    guard.reject(plan.plan_id, REASON)
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "rolled-back" and not guard.store.staged_ids()
    assert guard.store.digest() == plan.model_digest


def test_an_approval_from_before_the_monitor_does_not_commit_a_held_edit(home: Home) -> None:
    guard = home.guard({**SOFT, **UNDECIDED})
    plan = guard.plan(request_of())
    guard.approve(plan.plan_id, REASON)
    assert guard.apply(plan.plan_id).outcome == "held"
    with pytest.raises(HeldError, match="without this drift report"):
        guard.apply(plan.plan_id)


def test_a_held_edit_that_another_commit_overtook_is_dropped_not_committed(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    held = guard.plan(request_of(0))
    guard.apply(held.plan_id)
    sure = home.guard()
    done = sure.plan(request_of(1))
    sure.apply(done.plan_id)
    guard.approve(held.plan_id, REASON)
    with pytest.raises(StaleError, match="was staged on base"):
        guard.apply(held.plan_id)
    assert guard.state(held.plan_id) == "rolled-back"
    assert guard.store.digest() == sure.store.digest() and guard.verify()["versions"] == 1
