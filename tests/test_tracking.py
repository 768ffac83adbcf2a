"""What MLflow is told of an edit: all of it, once, and nothing cut short or hidden."""

from __future__ import annotations

import json
import math
from pathlib import Path

import builders
import pytest
from builder_parts import EIFFEL
from tracking_helpers import EXPERIMENT, dump, ledger_of, loader, migrated, tracker, uri

from guardedit.audit import mlflow_content as content
from guardedit.audit import mlflow_store, report
from guardedit.audit.desk import models
from guardedit.audit.tracking import Tracker
from guardedit.errors import TrackingError
from guardedit.records import canonical

__all__ = ["migrated", "tracker", "uri"]


def test_telling_an_edit_twice_changes_nothing(tracker: Tracker, uri: str) -> None:
    audit = builders.eiffel_committed()
    first = tracker.log_audit(audit)
    before = dump(uri, tracker.artifact_root)
    assert tracker.log_audit(audit) == first
    assert dump(uri, tracker.artifact_root) == before


def test_a_plan_has_one_run_and_a_child_for_each_stage_that_took_place(tracker: Tracker, uri: str) -> None:
    for audit in (builders.eiffel_committed(), builders.france_blocked()):
        tracker.log_audit(audit)
    shown = dump(uri, tracker.artifact_root)
    stages = {plan: sorted(s for p, s in shown if p == plan) for plan, _ in shown}
    assert stages[builders.eiffel_committed().plan.plan_id] == ["edit", "plan", "postop", "preop"]
    assert stages[builders.france_blocked().plan.plan_id] == ["edit", "plan", "preop"]
    for (plan, stage), run in shown.items():
        assert run["parent"] == (None if stage == "plan" else plan)
        assert all(name.startswith(stage) for name in run["metrics"]) or stage == "plan"


def test_every_number_of_the_record_is_there_and_every_number_there_is_finite(
    tracker: Tracker, uri: str
) -> None:
    audit = builders.finetune_rolled_back()
    tracker.log_audit(audit)
    shown = dump(uri, tracker.artifact_root)[(audit.plan.plan_id, "plan")]
    assert audit.drift is not None and audit.drift_base is not None
    expected = {f"preop/{s.name}": s.value for s in audit.plan.risk.scores}
    expected |= {f"postop/{s.name}": s.value for s in audit.drift.scores}
    expected |= {f"postop-base/{s.name}": s.value for s in audit.drift_base.scores}
    assert {name: shown["metrics"][name][0][0] for name in expected} == expected
    assert all(math.isfinite(v) for history in shown["metrics"].values() for v, _, _ in history)
    assert all(len(history) == 1 for history in shown["metrics"].values())


def test_a_score_without_value_is_left_out_and_its_limit_reads_as_unknown(tracker: Tracker, uri: str) -> None:
    audit = builders.eiffel_waiting()
    unmeasured = tuple(
        s.model_copy(update={"value": None}) if s.name == "leakage" else s for s in audit.plan.risk.scores
    )
    plan = audit.plan.model_copy(update={"risk": audit.plan.risk.model_copy(update={"scores": unmeasured})})
    tracker.log_audit(audit.model_copy(update={"plan": plan}))
    shown = dump(uri, tracker.artifact_root)[(plan.plan_id, "plan")]
    assert "preop/leakage" not in shown["metrics"] and "preop/leakage_share" in shown["metrics"]
    assert "? cannot tell" in shown["tags"]["mlflow.note.content"]
    assert shown["info"][1] == "SCHEDULED"


def test_artifacts_are_the_plan_the_report_and_tables_that_mlflow_reads(
    tracker: Tracker, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = builders.eiffel_committed()
    rendered = report.render(audit, tmp_path / "report")
    run_id = tracker.log_audit(audit, tmp_path / "report")
    files = dump(uri, tracker.artifact_root)[(audit.plan.plan_id, "plan")]["files"]
    assert files["plan.json"] == canonical(audit.plan)
    assert (
        files["report.html"] == rendered.html.read_bytes()
        and files["report.json"] == rendered.json.read_bytes()
    )
    assert {name for name in files if name.endswith(".svg")} == {
        f"figures/{name}.svg" for name in ("targets", "leaks", "domains", "volcano")
    }
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # `load_table` asks MLflow's global store
    with mlflow_store.connected(uri) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
        table = client.load_table(experiment, "tables/limits.json", run_ids=[run_id])
    assert mlflow.active_run() is None
    assert audit.postop is not None
    assert list(table["verdict"]) == ["✓ kept"] * (
        len(audit.plan.judgement.findings) + len(audit.postop.findings)
    )


def test_inputs_carry_their_whole_digest(tracker: Tracker, uri: str) -> None:
    audit = builders.eiffel_committed()
    tracker.log_audit(audit)
    inputs = dump(uri, tracker.artifact_root)[(audit.plan.plan_id, "plan")]["inputs"]
    assert audit.drift is not None
    told = {(name, json.loads(source)["digest"], stage) for name, _, source, stage in inputs}
    assert {(n, d, "preop") for n, d in audit.plan.risk.inputs.items()} <= told
    assert {(n, d, "postop") for n, d in audit.drift.inputs.items()} <= told


def test_nothing_is_cut_short_or_hidden(tracker: Tracker, uri: str) -> None:
    request = EIFFEL.model_copy(update={"subject": "Eiffel\u202eTower", "reason": "because " * 2000})
    audit = builders.eiffel_committed()
    audit = audit.model_copy(update={"plan": audit.plan.model_copy(update={"requests": (request,)})})
    tracker.log_audit(audit)
    shown = dump(uri, tracker.artifact_root)[(audit.plan.plan_id, "plan")]
    assert shown["tags"]["guardedit.plan_digest"] == audit.plan_digest
    assert "⟨U+202E⟩" in shown["info"][0] and "\u202e" not in json.dumps(shown["tags"], ensure_ascii=False)
    assert json.loads(shown["files"]["plan.json"])["requests"][0]["reason"] == request.reason


def test_an_own_approval_is_marked_on_the_run_and_on_the_version() -> None:
    audit = builders.eiffel_committed()
    assert audit.decision is not None
    said = audit.decision.model_copy(update={"outcome": "approved", "approver": "ana", "own": True})
    marked = audit.model_copy(update={"decision": said})
    for told in (content.tags(marked), models.version_tags(marked)):
        assert told["guardedit.decided_by"] == "ana (unsigned; own plan)"
    assert "own plan" in content.description(marked)


def test_a_report_can_name_its_run_before_the_run_is_filled(tracker: Tracker) -> None:
    audit = builders.france_blocked()
    run_id = tracker.open_run(audit)
    assert (
        tracker.log_audit(audit.model_copy(update={"mlflow_run_id": run_id, "mlflow_note": None})) == run_id
    )
    assert content.fingerprint(audit) == content.fingerprint(
        audit.model_copy(update={"mlflow_run_id": run_id})
    )


def test_a_plan_id_that_could_end_the_search_string_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    audit = builders.france_blocked()
    strange = audit.model_copy(
        update={"plan": audit.plan.model_copy(update={"plan_id": "x' OR tags.a = 'b"})}
    )
    with pytest.raises(TrackingError, match="plan id"):
        tracker.log_audit(strange)
    assert tracker.sync(ledger_of(tmp_path / "l.sqlite", strange), loader(strange)).behind == 1


def test_the_description_shows_the_verdict_and_each_limit() -> None:
    audit = builders.finetune_rolled_back()
    assert audit.postop is not None
    text = content.description(audit)
    rows = [line for line in text.splitlines() if line.startswith(("| ✓", "| ✗", "| ?"))]
    assert len(rows) == len(audit.plan.judgement.findings) + len(audit.postop.findings)
    assert text.startswith("## ↶ Rolled back: Eiffel Tower: Paris → Rome")
