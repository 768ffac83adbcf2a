"""Crashes between the record and the versions: a new process finishes what is on record and gives up the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pipeline_helpers import UNDECIDED, Home, home, request_of, world

from guardedit.audit.versions import VersionStore
from guardedit.errors import IntegrityError
from guardedit.pipeline import Guard

__all__ = ["home", "world"]


class Crashed(BaseException):
    """The process ended here: nothing below `except Exception` sees it."""


def crash(*_: Any, **__: Any) -> None:
    raise Crashed


def recovered(home: Home, **limits: Any) -> tuple[Guard, dict[str, Any]]:
    """A new process that recovers; recovering again finds nothing to do, and everything verifies."""
    guard = home.guard(**limits)
    found = guard.recover()
    before = home.trace()
    again = home.guard(**limits).recover()
    assert not any(again.values()) and home.trace() == before
    guard.verify()
    return guard, found


def test_a_commit_on_record_that_had_not_reached_the_versions_is_finished(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    with monkeypatch.context() as patch, pytest.raises(Crashed):
        patch.setattr(VersionStore, "commit", crash)
        guard.apply(plan.plan_id)
    assert guard.state(plan.plan_id) == "committed" and guard.store.digest() == plan.model_digest
    with pytest.raises(IntegrityError, match="guardedit recover"):
        home.guard().verify()
    after, found = recovered(home)
    assert found["finished"] == [plan.plan_id]
    assert after.store.digest() == after.handle.digest() != plan.model_digest


def test_a_commit_on_record_whose_copy_is_gone_is_given_up(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    with monkeypatch.context() as patch, pytest.raises(Crashed):
        patch.setattr(VersionStore, "commit", crash)
        guard.apply(plan.plan_id)
    guard.store.drop_staged(plan.plan_id)
    after, found = recovered(home)
    assert found["dropped"] == [plan.plan_id] and after.state(plan.plan_id) == "rolled-back"
    assert after.store.digest() == plan.model_digest


def test_an_undo_that_had_not_reached_the_ledger_was_not_made(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    audit = guard.apply(plan.plan_id)
    with monkeypatch.context() as patch, pytest.raises(Crashed):
        patch.setattr(guard.ledger, "append", crash)
        guard.rollback(plan.plan_id)
    assert guard.store.digest() == audit.digest_after
    after, _ = recovered(home)
    assert after.state(plan.plan_id) == "committed"
    assert after.rollback(plan.plan_id).digest_after == plan.model_digest


def test_an_undo_on_record_that_had_not_reached_the_versions_is_finished(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    audit = guard.apply(plan.plan_id)
    roll_back = VersionStore.roll_back

    def recorded_only(store: VersionStore, edit_id: str, before_switch: Callable[[Any], object]) -> Any:
        return roll_back(store, edit_id, lambda version: (before_switch(version), crash()))

    with monkeypatch.context() as patch, pytest.raises(Crashed):
        patch.setattr(VersionStore, "roll_back", recorded_only)
        guard.rollback(plan.plan_id)
    assert guard.state(plan.plan_id) == "rolled-back" and guard.store.digest() == audit.digest_after
    after, found = recovered(home)
    assert found["undone"] == [plan.plan_id] and after.state(plan.plan_id) == "rolled-back"
    assert after.store.digest() == plan.model_digest == after.handle.digest()


def test_an_undo_that_only_the_versions_know_is_put_on_record(home: Home) -> None:
    """Homes from when the switch came first."""
    guard = home.guard()
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    guard.store.roll_back(plan.plan_id)
    after, found = recovered(home)
    assert found["undone"] == [plan.plan_id] and after.state(plan.plan_id) == "rolled-back"
    assert after.store.digest() == plan.model_digest


def test_an_undo_that_had_not_begun_leaves_the_edit_committed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    audit = guard.apply(plan.plan_id)
    with monkeypatch.context() as patch, pytest.raises(Crashed):
        patch.setattr(VersionStore, "roll_back", crash)
        guard.rollback(plan.plan_id)
    after, _ = recovered(home)
    assert after.state(plan.plan_id) == "committed" and after.store.digest() == audit.digest_after
    assert after.rollback(plan.plan_id).digest_after == plan.model_digest


@pytest.mark.parametrize("where", ["stage", "monitor", "record"])
def test_a_crash_before_the_verdict_leaves_the_live_model_and_no_copy(
    home: Home, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    with monkeypatch.context() as patch, pytest.raises(Crashed):
        if where == "monitor":
            patch.setattr("guardedit.pipeline.applying.monitor", crash)
            patch.setattr("guardedit.pipeline.publishing.drop", crash)
        else:
            patch.setattr(*((VersionStore, "stage") if where == "stage" else (guard.ledger, "append")), crash)
        guard.apply(plan.plan_id)
    after, found = recovered(home)
    assert after.store.digest() == plan.model_digest and not after.store.staged_ids()
    if where == "monitor":
        assert found["dropped"] == [plan.plan_id] and after.state(plan.plan_id) == "rolled-back"
    else:
        assert after.apply(plan.plan_id).outcome == "committed"


def test_the_next_step_puts_right_what_a_crash_left_without_being_asked(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of(0))
    with monkeypatch.context() as patch, pytest.raises(Crashed):
        patch.setattr(VersionStore, "commit", crash)
        guard.apply(plan.plan_id)
    after = home.guard()
    second = after.plan(request_of(1))
    assert after.store.lineage().edit(plan.plan_id) is not None
    assert second.model_digest == after.store.digest() != plan.model_digest
    assert after.apply(second.plan_id).outcome == "committed"


def test_a_held_copy_that_is_gone_is_recorded_as_rolled_back(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    guard.store.drop_staged(plan.plan_id)
    after, found = recovered(home, limits=UNDECIDED)
    assert found["dropped"] == [plan.plan_id] and after.state(plan.plan_id) == "rolled-back"
