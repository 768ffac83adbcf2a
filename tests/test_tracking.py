"""MLflow as a view: it can be rebuilt, retold without change, and be away without harm."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import pytest
from builder_parts import EIFFEL

from guardedit.audit import mlflow_content as content
from guardedit.audit import mlflow_runs, mlflow_store, report, tracking
from guardedit.audit.desk import models
from guardedit.audit.ledger import Ledger
from guardedit.audit.tracking import SyncResult, Tracker
from guardedit.errors import IntegrityError, TrackingError
from guardedit.records import AuditReport, canonical

EXPERIMENT = "guardedit/smollm2-135m"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, migrated once."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    tracking.prepare(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(migrated: Path, tmp_path: Path) -> str:
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def tracker(uri: str, tmp_path: Path) -> Tracker:
    return Tracker(uri, tmp_path / "mlflow")


def runs_of(uri: str) -> list[Any]:
    with mlflow_store.connected(uri) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []


def dump(uri: str, root: Path) -> dict[str, Any]:
    """Everything that MLflow holds, without the run ids that it draws itself."""
    found = runs_of(uri)
    plan_of = {run.info.run_id: run.data.tags["guardedit.plan_id"] for run in found}
    shown: dict[str, Any] = {}
    with mlflow_store.connected(uri) as client:
        for run in found:
            parent = run.data.tags.get("mlflow.parentRunId")
            folder = root / "artifacts" / run.info.run_id / "artifacts"
            files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
            key = (run.data.tags["guardedit.plan_id"], run.data.tags["guardedit.stage"])
            assert key not in shown, f"{key} is told twice"
            shown[key] = {  # type: ignore[index]
                "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
                "tags": tags,
                "params": run.data.params,
                "metrics": {
                    name: [
                        (m.value, m.timestamp, m.step)
                        for m in client.get_metric_history(run.info.run_id, name)
                    ]
                    for name in run.data.metrics
                },
                "parent": plan_of.get(parent),
                "inputs": sorted(
                    (i.dataset.name, i.dataset.digest, i.dataset.source, i.tags[0].value)
                    for i in run.inputs.dataset_inputs
                ),
                "files": files,
            }
    return shown


def ledger_of(path: Path, *audits: AuditReport) -> Ledger:
    ledger = Ledger(path)
    for audit in audits:
        ids = {"plan_id": audit.plan.plan_id, "edit_id": audit.edit_id}
        ledger.append("planned", ids)
        ledger.append("finished", {**ids, "outcome": audit.outcome})
    return ledger


def loader(*audits: AuditReport) -> Callable[[str], AuditReport | None]:
    return {audit.plan.plan_id: audit for audit in audits}.get


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


def test_a_database_whose_driver_is_missing_says_which_extra_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(TrackingError, match=r"guardedit\[postgres\]"):
        Tracker("postgresql://desk@127.0.0.1:9/desk", tmp_path).open_run(builders.france_blocked())


def test_a_lost_database_is_rebuilt_from_the_ledger_alone(
    tracker: Tracker, uri: str, migrated: Path, tmp_path: Path
) -> None:
    audits = (builders.eiffel_waiting(), builders.france_blocked())
    ledger = ledger_of(tmp_path / "ledger.sqlite", *audits)
    assert tracker.sync(ledger, loader(*audits)) == SyncResult(created=2, updated=0, behind=0)
    before = dump(uri, tracker.artifact_root)
    shutil.copyfile(migrated, tmp_path / "again.db")
    again = Tracker(f"sqlite:///{tmp_path / 'again.db'}", tmp_path / "again")
    assert again.behind(ledger) == 2
    again.sync(ledger, loader(*audits))
    assert dump(again.uri, again.artifact_root) == before
    assert again.behind(ledger) == 0


def test_sync_tells_only_what_is_new(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    blocked, waiting = builders.france_blocked(), builders.eiffel_waiting()
    ledger = ledger_of(tmp_path / "ledger.sqlite", blocked, waiting)
    tracker.sync(ledger, loader(blocked, waiting))
    asked: list[str] = []
    rejected = waiting.model_copy(update={"outcome": "rejected"})

    def load(plan_id: str) -> AuditReport | None:
        asked.append(plan_id)
        return loader(blocked, rejected)(plan_id)

    assert tracker.sync(ledger, load) == SyncResult(0, 0, 0) and asked == []
    ledger.append("decided", {"plan_id": waiting.plan.plan_id, "outcome": "rejected"})
    assert tracker.behind(ledger) == 1
    assert tracker.sync(ledger, load) == SyncResult(0, 1, 0) and asked == [waiting.plan.plan_id]
    shown = dump(uri, tracker.artifact_root)[(waiting.plan.plan_id, "plan")]
    assert shown["tags"]["guardedit.outcome"] == "rejected" and shown["info"][1] == "FINISHED"


def test_a_plan_that_cannot_be_read_is_behind_and_others_are_told(
    tracker: Tracker, uri: str, tmp_path: Path
) -> None:
    good, bad, missing = builders.france_blocked(), builders.eiffel_committed(), builders.eiffel_waiting()
    ledger = ledger_of(tmp_path / "ledger.sqlite", bad, missing, good)

    def load(plan_id: str) -> AuditReport | None:
        if plan_id == bad.plan.plan_id:
            raise IntegrityError("plan.json was changed")
        return loader(good)(plan_id)

    result = tracker.sync(ledger, load)
    assert (result.created, result.behind) == (1, 2)
    assert "was changed" in result.notes[0] and "no report" in result.notes[1]
    assert {run.data.tags["guardedit.plan_id"] for run in runs_of(uri)} == {good.plan.plan_id}


def test_a_telling_that_was_interrupted_is_finished_by_the_next(
    tracker: Tracker, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = builders.eiffel_committed()
    other = Tracker(f"sqlite:///{tmp_path / 'whole.db'}", tmp_path / "whole")
    shutil.copyfile(tmp_path / "mlflow.db", tmp_path / "whole.db")
    other.log_audit(audit, ledger_seq=2)
    run_id = tracker.open_run(audit)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_runs, "_files", _stop)
        with pytest.raises(KeyboardInterrupt):
            tracker.log_audit(audit, ledger_seq=2)
    assert tracker.log_audit(audit, ledger_seq=2) == run_id
    assert dump(uri, tracker.artifact_root) == dump(other.uri, other.artifact_root)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_report_can_name_its_run_before_the_run_is_filled(tracker: Tracker) -> None:
    audit = builders.france_blocked()
    run_id = tracker.open_run(audit)
    assert (
        tracker.log_audit(audit.model_copy(update={"mlflow_run_id": run_id, "mlflow_note": None})) == run_id
    )
    assert content.fingerprint(audit) == content.fingerprint(
        audit.model_copy(update={"mlflow_run_id": run_id})
    )


def test_environment_and_global_state_are_as_they_were(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("DO_NOT_TRACK", "maybe")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    before, uri = dict(os.environ), mlflow.get_tracking_uri()
    tracker.log_audit(builders.france_blocked())
    assert dict(os.environ) == before
    assert mlflow.get_tracking_uri() == uri and mlflow.active_run() is None


def test_a_server_that_is_down_is_given_up_on_at_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(TrackingError, match="guardedit sync") as caught:
        Tracker(f"http://user:secret@127.0.0.1:{port}", tmp_path).log_audit(builders.france_blocked())
    assert time.monotonic() - started < 10
    assert "secret" not in str(caught.value)


def test_a_server_that_accepts_and_says_nothing_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "_HTTP", {**mlflow_store._HTTP, "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(TrackingError):
            Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path).open_run(
                builders.france_blocked()
            )
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("damage", ["text", "folder", "cut"])
def test_a_broken_database_is_an_error_and_is_left_as_it_was(
    migrated: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "mlflow.db"
    if damage == "text":
        path.write_text("this is no database" * 100)
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(migrated.read_bytes()[:5000])
    before = path.read_bytes() if path.is_file() else None
    started = time.monotonic()
    with pytest.raises(TrackingError):
        Tracker(f"sqlite:///{path}", tmp_path / "mlflow").log_audit(builders.france_blocked())
    assert time.monotonic() - started < 20
    assert (path.read_bytes() if path.is_file() else None) == before


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


@pytest.mark.slow
def test_two_processes_on_a_new_database_both_succeed(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from guardedit.audit.tracking import prepare; prepare(sys.argv[1])"
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    started = [subprocess.Popen([sys.executable, "-c", code, uri]) for _ in range(2)]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")] == []
    Tracker(uri, tmp_path / "mlflow").open_run(builders.france_blocked())
