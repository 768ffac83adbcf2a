"""From plan to commit and back, on a tiny model: what is planned is applied, and every undo is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pipeline_helpers as kit
import pytest
import torch
from pipeline_helpers import SOFT, Home, home, request_of, world

import guardedit
from guardedit.audit.versions import VersionStore
from guardedit.errors import (
    BadRequestError,
    IntegrityError,
    LockedError,
    NotFoundError,
    StaleError,
    StorageError,
)
from guardedit.models import sources
from guardedit.pipeline import Guard
from guardedit.pipeline.metrics import postop_scores
from guardedit.records import Decision, Plan

__all__ = ["home", "world"]

REASON = "looked at it: the tests want it"


def kinds(guard: Guard) -> list[str]:
    return [entry.kind for entry in guard.ledger.entries()]


def test_a_plan_leaves_the_model_bit_for_bit_as_it_was(home: Home) -> None:
    guard = home.guard()
    before = guard.handle.digest()
    plan = guard.plan(request_of())
    assert plan.judgement.outcome == "auto-approved"
    assert guard.handle.digest() == before == guard.store.digest() == plan.model_digest
    assert not guard.store.live_overrides() and not guard.store.staged_ids()


def test_an_edit_is_committed_loaded_exported_and_undone_bit_for_bit(home: Home, tmp_path: Path) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    audit = guard.apply(plan.plan_id)
    planned = plan.delta.changes[0]
    assert audit.outcome == "committed"
    assert audit.digest_staged == audit.digest_after == guard.store.digest() != plan.model_digest
    assert guard.handle.manifest()[planned.parameter] == planned.digest_after

    live = guardedit.load(home.folder)
    assert live.digest() == audit.digest_after
    folder = guard.export(tmp_path / "exported")
    exported = sources.load(str(folder))
    assert exported.digest() == audit.digest_after
    assert torch.equal(exported.weight(kit.LAYER), guard.handle.weight(kit.LAYER))

    undone = guard.rollback(plan.plan_id)
    assert undone.outcome == "rolled-back" and undone.digest_after == plan.model_digest
    assert guard.handle.digest() == plan.model_digest == guardedit.load(home.folder).digest()
    assert guard.verify()["digest"] == plan.model_digest
    with pytest.raises(StaleError, match="rolled-back"):
        guard.apply(plan.plan_id)


def test_applying_a_committed_plan_again_changes_nothing(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    first = guard.apply(plan.plan_id)
    before = home.trace()
    assert guard.apply(plan.plan_id) == first == home.guard().apply(plan.plan_id)
    assert home.trace() == before


def test_a_plan_made_before_another_commit_is_stale(home: Home) -> None:
    guard = home.guard()
    old, new = guard.plan(request_of(0)), guard.plan(request_of(1))
    guard.apply(new.plan_id)
    live = guard.store.digest()
    assert guard.state(old.plan_id) == "stale"
    with pytest.raises(StaleError, match="the model"):
        guard.apply(old.plan_id)
    assert guard.store.digest() == live
    assert guard.report(old.plan_id).audit.outcome == "stale"


def test_a_commit_by_another_process_makes_a_plan_stale_and_is_not_lost(home: Home) -> None:
    here, there = home.guard(), home.guard()
    plan = here.plan(request_of(0))
    other = there.plan(request_of(1))
    there.apply(other.plan_id)
    with pytest.raises(StaleError, match="the model"):
        here.apply(plan.plan_id)
    assert here.handle.digest() == here.store.digest() == there.store.digest()
    again = here.plan(request_of(0))
    assert again.model_digest == there.store.digest()


def test_a_changed_policy_makes_a_plan_stale(home: Home) -> None:
    plan = home.guard().plan(request_of())
    with pytest.raises(StaleError, match="the policy"):
        home.guard(SOFT).apply(plan.plan_id)


def test_a_home_that_somebody_else_edits_is_locked(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    before = home.trace()
    with VersionStore(home.folder).lock():
        for step in (guard.apply, guard.rollback, lambda name: guard.reject(name, REASON)):
            with pytest.raises(LockedError, match="is being edited by process"):
                step(plan.plan_id)
    assert home.trace() == before


def test_without_space_nothing_is_staged_and_the_plan_can_be_applied_later(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    before = home.trace()
    guard.store = VersionStore(home.folder, free=lambda _: 10)
    with pytest.raises(StorageError, match="10 bytes free"):
        guard.apply(plan.plan_id)
    assert home.trace() == before and guard.handle.digest() == plan.model_digest
    assert home.guard().apply(plan.plan_id).outcome == "committed"


def test_a_monitor_that_fails_drops_the_copy_and_leaves_the_model(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("guardedit.pipeline.applying.monitor", stop)
    with pytest.raises(KeyboardInterrupt):
        guard.apply(plan.plan_id)
    assert guard.state(plan.plan_id) == "rolled-back" and not guard.store.staged_ids()
    assert guard.handle.digest() == plan.model_digest == guard.store.digest()


def test_an_edit_by_fine_tuning_goes_the_same_way(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of(), editor="finetune")
    assert plan.delta.changes[0].rank is None
    assert guard.apply(plan.plan_id).outcome == "committed"
    assert guard.rollback(plan.plan_id).digest_after == plan.model_digest


def test_the_monitor_measures_what_policies_may_name_and_nothing_else(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    drift = guard.apply(plan.plan_id).drift
    assert drift is not None
    assert {score.name for score in drift.scores} == postop_scores(guard.kit.monitors)


def test_the_target_that_the_model_says_today_is_found_and_an_equal_one_refused(home: Home) -> None:
    guard = home.guard()
    request = request_of(target_true=None)
    plan = guard.plan(request)
    found = plan.requests[0].target_true
    assert found and found.strip()
    from guardedit.pipeline.trying import before_and_after, continued

    said = continued(guard.handle, request.filled, 3).strip()
    with pytest.raises(BadRequestError, match="already answers"):
        guard.plan(request_of(target_true=None, target_new=said))
    before, after = before_and_after(guard, plan.plan_id, request.filled, 4)
    assert before == continued(guard.handle, request.filled, 4) and isinstance(after, str)


def test_a_request_may_be_a_mapping_and_an_unknown_key_is_named(home: Home) -> None:
    with pytest.raises(BadRequestError, match="unknown key 'subjet'"):
        home.guard().plan({"subjet": "x", "prompt": "{} is", "target_new": "y"})


def test_a_home_guards_one_model(home: Home, tmp_path: Path) -> None:
    home.guard().plan(request_of())
    other = kit.build_folder("llama", tmp_path / "other", seed=9)
    guard = home.guard(model=str(other))
    with pytest.raises(StaleError, match="use another --home"):
        guard.handle


def test_load_refuses_a_home_that_guards_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="guards no model yet"):
        guardedit.load(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_status_of_nothing_makes_nothing(home: Home) -> None:
    guard = home.guard()
    assert guard.status()["plans"] == [] and guard.recover()["finished"] == []
    assert not home.folder.exists()


def test_what_is_recorded_reads_back_as_it_was(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    again = home.guard()
    assert again.read_plan(plan.plan_id) == plan and isinstance(again.read_plan(plan.plan_id), Plan)
    assert isinstance(again.decision(plan.plan_id), Decision)
    guard.apply(plan.plan_id)
    assert kinds(guard) == ["planned", "staged", "monitored", "committed"]
    shutil.rmtree(home.folder / "plans")
    with pytest.raises(IntegrityError, match="is gone"):
        again.read_plan(plan.plan_id)


@pytest.mark.parametrize("editor", ["finetune-full", "lora"])
def test_an_edit_of_many_parameters_is_committed_and_comes_back_bit_for_bit(home: Home, editor: str) -> None:
    """And an edit of one layer on top of it, which is then compared with a base whose embeddings are others."""
    guard = home.guard()
    plan = guard.plan(request_of(), editor=editor, hparams={"steps": 2, "learning_rate": 1e-3})
    assert len(plan.delta.changes) > 10
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "committed" and audit.drift is not None
    assert all(audit.drift.integrity.values())
    later = guard.plan(request_of(1))
    found = guard.apply(later.plan_id)
    assert found.drift_base is not None and all(found.drift_base.integrity.values())
    kls = [report.score("far_kl") for report in (found.drift, found.drift_base) if report is not None]
    assert [kl is not None and kl.value is not None and kl.value > 0 for kl in kls] == [True, True]
    assert home.guard().handle.digest() == guard.store.digest()
    guard.rollback(later.plan_id)
    assert guard.rollback(plan.plan_id).digest_after == plan.model_digest == guard.handle.digest()


def test_a_model_spread_by_a_device_map_is_planned_and_edited_to_the_same_bytes(home: Home) -> None:
    plain = home.guard().plan(request_of())
    spread = home.guard(device_map="auto")
    again = spread.plan(request_of())
    assert again.delta.changes == plain.delta.changes
    assert spread.apply(again.plan_id).outcome == "committed"
    assert home.guard().handle.digest() == spread.handle.digest() != plain.model_digest


def test_the_command_line_hands_a_device_map_on(home: Home) -> None:
    assert home.run("--device-map", "auto", "plan", str(home.requests(request_of().model_dump()))).code == 0
    refused = home.run("--device-map", "sideways", "plan", str(home.requests(request_of().model_dump())))
    assert refused.code == 2 and "sideways" in refused.err
