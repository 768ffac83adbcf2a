"""MLflow lost, behind, away or broken: it is rebuilt and caught up with, and is away without harm."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import builders
import pytest
from tracking_helpers import dump, ledger_of, loader, migrated, runs_of, tracker, uri

from guardedit.audit import mlflow_runs, mlflow_store
from guardedit.audit.tracking import SyncResult, Tracker
from guardedit.errors import IntegrityError, TrackingError
from guardedit.records import AuditReport

__all__ = ["migrated", "tracker", "uri"]


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
