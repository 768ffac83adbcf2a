"""MLflow away: said, on record, and caught up with later; the ledger never waits for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import CLOSED_PORT, SOFT, Home, empty_mlflow, home, mlflow_home, request_of, world

from guardedit.audit.mlflow_store import connected
from guardedit.errors import TrackingError
from guardedit.gate.approvals import make_waiver
from guardedit.pipeline import Guard

__all__ = ["empty_mlflow", "home", "mlflow_home", "world"]


def uri(home: Home) -> str:
    return f"sqlite:///{(home.folder / 'mlflow.db').absolute()}"


def shown(home: Home) -> dict[tuple[str, str], dict[str, Any]]:
    """What MLflow shows: (plan, stage) -> run id, tags, metrics, and the bytes of its artifacts."""
    found = {}
    with connected(uri(home)) as client:
        experiments = [
            e.experiment_id for e in client.search_experiments(filter_string="name LIKE 'guardedit/%'")
        ]
        for run in client.search_runs(experiments) if experiments else ():
            artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
            found[(run.data.tags["guardedit.plan_id"], run.data.tags["guardedit.stage"])] = {
                "id": run.info.run_id,
                "tags": dict(run.data.tags),
                "metrics": dict(run.data.metrics),
                "files": {p.name: p.read_bytes() for p in artifacts.rglob("*") if p.is_file()},
            }
    return found


def applied(home: Home, mlflow: str) -> tuple[Guard, str]:
    guard = home.guard(tracking_uri=mlflow)
    plan_id = guard.plan(request_of()).plan_id
    guard.apply(plan_id)
    return guard, plan_id


def test_mlflow_away_changes_no_exit_code_and_sync_catches_up(mlflow_home: Home) -> None:
    home = mlflow_home
    front = ("--reports", str(home.folder.parent / "reports"))
    asked = str(home.requests(request_of().model_dump(exclude_none=True)))
    plan_id = home.run("--json", "plan", asked).json["plans"][0]["plan_id"]
    ran = home.run("apply", plan_id, *front)
    assert ran.code == 0 and "MLflow: MLflow at http://127.0.0.1:9 did not answer" in ran.out
    (entry,) = home.guard().ledger.entries("untracked")
    assert entry.body["plan_id"] == plan_id and "did not answer" in entry.body["reason"]
    page = (home.folder.parent / "reports" / plan_id / "report.json").read_text("utf-8")
    assert json.loads(page)["mlflow_run_id"] is None and "guardedit sync" in json.loads(page)["mlflow_note"]
    refused = home.run("sync", *front)
    assert refused.code == 2 and "The ledger is complete" in refused.err
    assert shown(home) == {}

    done = home.run("--json", "sync", *front, "--tracking-uri", uri(home))
    assert done.code == 0 and list(done.json["told"]) == [plan_id] and done.json["behind"] == 0
    runs = shown(home)
    assert {stage for _, stage in runs} == {"plan", "preop", "edit", "postop"}
    assert runs[plan_id, "plan"]["id"] == done.json["told"][plan_id]
    assert runs[plan_id, "plan"]["metrics"]["preop/leakage"] > 0
    report = json.loads((home.folder.parent / "reports" / plan_id / "report.json").read_text("utf-8"))
    assert report["mlflow_run_id"] == done.json["told"][plan_id] and report["mlflow_note"] is None

    before = home.trace()
    again = home.run("--json", "sync", *front, "--tracking-uri", uri(home))
    assert again.json["told"] == {} and again.json["behind"] == 0
    assert shown(home) == runs and home.trace() == before


def test_the_report_names_its_run_and_mlflow_holds_the_final_files(mlflow_home: Home) -> None:
    guard, plan_id = applied(mlflow_home, uri(mlflow_home))
    published = guard.report(plan_id)
    assert published.mlflow_problem is None
    record = json.loads(published.files.json.read_text("utf-8"))
    assert record["mlflow_run_id"] == published.mlflow_run_id == published.audit.mlflow_run_id
    runs = shown(mlflow_home)
    files = runs[plan_id, "plan"]["files"]
    assert runs[plan_id, "plan"]["id"] == published.mlflow_run_id
    for path in (published.files.json, published.files.md, published.files.html):
        assert files[path.name] == path.read_bytes()
    assert files["plan.json"] == (guard.plan_folder(plan_id) / "plan.json").read_bytes()
    again = guard.report(plan_id)
    assert again.mlflow_run_id == published.mlflow_run_id and shown(mlflow_home) == runs
    assert guard.sync()["told"] == {}


def test_sync_tells_of_an_undo_and_of_plans_that_were_never_reported(mlflow_home: Home) -> None:
    guard, plan_id = applied(mlflow_home, uri(mlflow_home))
    guard.report(plan_id)
    guard.rollback(plan_id)
    other = guard.plan(request_of(1)).plan_id
    assert list(guard.sync()["told"]) == [plan_id, other]
    runs = shown(mlflow_home)
    assert runs[plan_id, "plan"]["tags"]["guardedit.outcome"] == "rolled-back"
    assert runs[other, "plan"]["tags"]["guardedit.outcome"] == "auto-approved"
    assert json.loads(runs[plan_id, "plan"]["files"]["report.json"])["outcome"] == "rolled-back"


def test_replaced_and_outdated_plans_are_told_too(mlflow_home: Home) -> None:
    guard = mlflow_home.guard(SOFT, tracking_uri=uri(mlflow_home))
    plan = guard.plan(request_of())
    lifted = make_waiver("preop/delta_norm_ratio", guard.user, "the tests want it so", "8h", guard.now())
    made = guard.waive(plan.plan_id, [lifted])
    found = guard.sync()
    assert list(found["told"]) == [plan.plan_id, made.plan_id] and found["behind"] == 0, found["notes"]
    assert shown(mlflow_home)[plan.plan_id, "plan"]["tags"]["guardedit.outcome"] == "superseded"


def test_a_plan_that_cannot_be_read_is_counted_and_holds_up_no_other(mlflow_home: Home) -> None:
    guard, plan_id = applied(mlflow_home, uri(mlflow_home))
    other = guard.plan(request_of(1)).plan_id
    (guard.plan_folder(plan_id) / "plan.json").write_bytes(b"{}")
    found = guard.sync()
    assert list(found["told"]) == [other] and found["behind"] == 1 and plan_id in found["notes"][0]


def test_sync_away_raises_for_a_program_and_changes_nothing(home: Home) -> None:
    guard, _ = applied(home, CLOSED_PORT)
    before = home.trace()
    with pytest.raises(TrackingError, match="did not answer"):
        guard.sync()
    assert home.trace() == before
