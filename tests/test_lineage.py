"""Many edits in a row on one layer, crashes between the record and the versions, and bytes that somebody changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_helpers import FACTS, LIMITS, UNDECIDED, Home, flipped, home, request_of, world

from guardedit.audit.versions import VersionStore
from guardedit.errors import GuardeditError, IntegrityError, OutOfOrderError
from guardedit.models import statistics
from guardedit.pipeline import Guard
from guardedit.records import AuditReport, Plan
from guardedit.risk import banks

__all__ = ["home", "world"]

LINEAGE = {"postop/lineage_far_kl": ("<=", 100.0, "hard")}


class Crashed(BaseException):
    """The process ended here: nothing below `except Exception` sees it."""


def crash(*_: Any, **__: Any) -> None:
    raise Crashed


# -- ten edits in a row


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Names of the calls of a function, which still does its work."""
    calls: list[str] = []
    original: Callable[..., Any] = getattr(owner, name)

    def count(*args: Any, **named: Any) -> Any:
        calls.append(name)
        return original(*args, **named)

    patch.setattr(owner, name, count)
    return calls


def test_ten_edits_in_a_row_collect_nothing_and_are_undone_in_order(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(LINEAGE)
    first = guard.plan(request_of(0))
    gathered = counted(monkeypatch, statistics, "collect"), counted(monkeypatch, banks, "_text_keys")
    files = {
        path: path.stat().st_mtime_ns for path in (*home.world.kit.rglob("*"), *home.world.model.rglob("*"))
    }
    plans, audits = [first], [guard.apply(first.plan_id)]
    for number in range(1, len(FACTS)):
        plans.append(guard.plan(request_of(number)))
        audits.append(guard.apply(plans[-1].plan_id))
    assert gathered == ([], [])
    assert {path: path.stat().st_mtime_ns for path in files} == files
    chained(plans, audits)
    with pytest.raises(OutOfOrderError, match=plans[9].plan_id) as refused:
        guard.rollback(plans[3].plan_id)
    assert refused.value.exit_code == 8 and guard.state(plans[3].plan_id) == "committed"
    assert guard.verify()["versions"] == 10
    for plan in reversed(plans):
        assert guard.rollback(plan.plan_id).digest_after == plan.model_digest
    assert guard.handle.digest() == first.model_digest == home.guard().handle.digest()
    assert guard.verify()["versions"] == 20


def chained(plans: list[Plan], audits: list[AuditReport]) -> None:
    """Each edit stands on the one before; from the second on, drift against the base stands beside the step's."""
    assert len({plan.delta.changes[0].parameter for plan in plans}) == 1
    for plan, before in zip(plans[1:], audits, strict=False):
        assert plan.model_digest == before.digest_after and plan.base_digest == plans[0].model_digest
    assert all(audit.outcome == "committed" and audit.drift is not None for audit in audits)
    assert audits[0].drift_base is None
    for audit in audits[1:]:
        assert audit.drift is not None and audit.drift_base is not None and audit.postop is not None
        assert (audit.drift.reference, audit.drift_base.reference) == ("previous", "base")
        judged = {finding.metric: finding.value for finding in audit.postop.findings}
        total = audit.drift_base.score("far_kl")
        assert total is not None and judged["postop/lineage_far_kl"] == total.value
    step, total = audits[-1].drift, audits[-1].drift_base
    assert step is not None and total is not None
    assert step.score("far_kl") != total.score("far_kl")


def test_the_sum_of_small_edits_has_a_limit_of_its_own(home: Home) -> None:
    guard = home.guard()
    first = guard.plan(request_of(0))
    base = guard.apply(first.plan_id).drift
    assert base is not None
    limit = {"postop/lineage_target_p_new": ("<=", -1.0, "hard")}
    strict = home.guard(limit)
    audit = strict.apply(strict.plan(request_of(1)).plan_id)
    assert audit.outcome == "rolled-back" and audit.postop is not None
    failed = [f.metric for f in audit.postop.findings if f.verdict == "fail"]
    assert failed == ["postop/lineage_target_p_new"]


# -- crashes


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


# -- changed bytes


def some_offsets(path: Path, n: int = 1) -> list[int]:
    size = path.stat().st_size
    return [0, size - 1, *random.Random(path.name).sample(range(size), min(n, size))]


def refused(home: Home, plan_id: str, path: Path, limits: Any = None) -> None:
    """Each flip is an IntegrityError when the plan is applied, and nothing changes."""
    for offset in some_offsets(path):
        with flipped(path, offset):
            before = home.trace()
            with pytest.raises(IntegrityError) as caught:
                home.guard(limits).apply(plan_id)
            assert caught.value.exit_code == 6
            assert home.trace() == before, (path.name, offset)


def test_a_byte_changed_in_anything_that_a_plan_rests_on_stops_it(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    own = [guard.plan_folder(plan.plan_id) / name for name in ("plan.json", "delta.safetensors")]
    files = (
        "sae_weights.safetensors",
        "cfg.json",
        "card.json",
        "labels.json",
        "stats.safetensors",
        "digests.json",
    )
    theirs = [home.world.moment, home.world.kit / "policy.toml", home.world.kit / "kit.json"]
    for path in (
        *own,
        *theirs,
        *(home.world.saes[1] / name for name in files),
        home.world.saes[0] / files[0],
    ):
        refused(home, plan.plan_id, path)
    assert home.guard().apply(plan.plan_id).outcome == "committed"


def test_a_byte_changed_in_a_held_copy_stops_its_commit(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    guard.approve(plan.plan_id, "looked at the report")
    for path in sorted((home.folder / "model" / "staged").rglob("*.*")):
        if path.is_file():
            refused(home, plan.plan_id, path, UNDECIDED)
    assert home.guard(UNDECIDED).apply(plan.plan_id).outcome == "committed"


def test_a_byte_changed_in_a_committed_edit_stops_its_undo(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    live = guard.apply(plan.plan_id).digest_after
    for path in sorted((home.folder / "model" / "versions").rglob("*.*")):
        for offset in some_offsets(path) if path.is_file() else ():
            with flipped(path, offset):
                before = home.trace()
                for step in (lambda: home.guard().rollback(plan.plan_id), lambda: home.guard().verify()):
                    with pytest.raises(IntegrityError):
                        step()
                assert home.trace() == before
    assert home.guard().store.digest() == live
    assert home.guard().rollback(plan.plan_id).digest_after == plan.model_digest


def test_an_older_pointer_put_back_is_seen_although_every_record_is_genuine(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    pointer = home.folder / "model" / "CURRENT"
    before = pointer.read_bytes()
    guard.apply(plan.plan_id)
    pointer.write_bytes(before)
    with pytest.raises(IntegrityError, match="committed in the ledger"):
        home.guard().verify()


@pytest.fixture
def told(home: Home) -> Home:
    """A home whose ledger tells of a plan and its commit."""
    guard = home.guard()
    guard.apply(guard.plan(request_of()).plan_id)
    return home


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_no_byte_of_the_ledger_can_change_what_a_reader_reads(told: Home, share: float, mask: int) -> None:
    path = told.folder / "ledger.sqlite"
    truth = [vars(entry) for entry in told.guard().ledger.entries()]
    status = told.guard().status()
    with flipped(path, int(share * path.stat().st_size), mask):
        try:
            assert [vars(entry) for entry in told.guard().ledger.entries()] == truth
            assert told.guard().status() == status
        except GuardeditError as error:
            assert isinstance(error, IntegrityError)
    assert LIMITS and told.guard().status() == status
