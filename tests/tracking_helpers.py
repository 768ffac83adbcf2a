"""An empty MLflow, everything that it holds, and ledgers to tell it of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardedit.audit import mlflow_store, tracking
from guardedit.audit.ledger import Ledger
from guardedit.audit.tracking import Tracker
from guardedit.records import AuditReport

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
