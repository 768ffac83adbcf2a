"""The record as people read it: report files and the MLflow view. Neither can stop an edit or lose one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.audit.report import RenderedReport, render
from guardedit.audit.tracking import Story, Tracker
from guardedit.errors import StorageError, TrackingError
from guardedit.pipeline.applying import UNTRACKED, read_report_facts
from guardedit.pipeline.history import History
from guardedit.pipeline.papers import Papers, at_this_moment
from guardedit.pipeline.patience import is_server, within
from guardedit.pipeline.workspace import Workspace
from guardedit.records import AuditReport

SECONDS = 60.0
"""For a server to take in one edit's run."""


@dataclass(frozen=True)
class Published:
    """An audit record, its files, and its MLflow run where there is one."""

    audit: AuditReport
    files: RenderedReport
    mlflow_run_id: str | None
    mlflow_problem: str | None


def tracking_uri(workspace: History) -> str:
    """Where MLflow's records go: the setting, or a SQLite file under the home."""
    return workspace.settings.tracking_uri or f"sqlite:///{(workspace.home / 'mlflow.db').absolute()}"


def tracker(workspace: History) -> Tracker:
    """The MLflow adapter of this home."""
    root = (workspace.home / "mlflow-artifacts").absolute()
    return Tracker(tracking_uri(workspace), root, Papers(workspace))


def publish(workspace: Workspace, edit_id: str) -> Published:
    """Write report.json, .md and .html and log the edit's MLflow run; MLflow being away is recorded and no more."""
    plan = workspace.read_plan(edit_id)
    audit = read_report_facts(workspace, plan)
    folder = report_folder(workspace, edit_id)
    try:
        return _tracked(workspace, audit, folder)
    except TrackingError as error:
        workspace.ledger.append(UNTRACKED, {"plan_id": edit_id, "edit_id": edit_id, "reason": str(error)})
        noted = audit.model_copy(
            update={"mlflow_note": f"MLflow was not reached: {error}. `guardedit sync` catches up."}
        )
        return Published(noted, render(noted, folder), None, str(error))


def _tracked(workspace: Workspace, audit: AuditReport, folder: Path) -> Published:
    """The run is opened first, so that the files can name it and MLflow gets the files as they are in the end."""
    seq = workspace.history(audit.edit_id)[-1].seq
    mlflow = tracker(workspace)
    named = audit.model_copy(update={"mlflow_run_id": _patiently(workspace, lambda: mlflow.open_run(audit))})
    files = render(named, folder)
    _patiently(workspace, lambda: mlflow.log_audit(named, folder, seq))
    return Published(named, files, named.mlflow_run_id, None)


def _patiently(workspace: History, work: Callable[[], str]) -> str:
    """A server gets its time; a file in the home is ours, and is waited for."""
    return within(SECONDS, work) if is_server(tracking_uri(workspace)) else work()


def report_folder(workspace: History, edit_id: str) -> Path:
    """Where an edit's report lies."""
    return workspace.settings.reports / edit_id


def tell(record: History, plan_ids: Sequence[str]) -> tuple[str, ...]:
    """Show some plans in MLflow as they stand, without report files in the home; what could not be told, in words.

    Raises TrackingError where MLflow cannot be reached.
    """
    still = at_this_moment(record)
    late = [(plan_id, still.history(plan_id)[-1].seq) for plan_id in plan_ids]
    done = tracker(still).tell(
        late, lambda plan_id: Story(read_report_facts(still, still.read_plan(plan_id)), write=lambda _: None)
    )
    return done.notes


def sync(workspace: Workspace) -> dict[str, Any]:
    """Bring MLflow to what the ledger says; raises TrackingError where it cannot be reached.

    Plans that MLflow shows as they stand are left alone; a plan that cannot be told is counted as `behind`, and
    `notes` says why. Reports of plans that are told are written anew: they name their run.
    """
    still = at_this_moment(workspace)
    told: dict[str, str | None] = {}
    unwritten: list[str] = []

    def write(named: AuditReport) -> Path | None:
        told[named.edit_id] = named.mlflow_run_id
        folder = report_folder(still, named.edit_id)
        try:
            render(named, folder)
        except StorageError as error:
            unwritten.append(f"{named.edit_id}: its report was not written: {error}")
            return None
        return folder

    done = tracker(still).sync(
        still.ledger,
        lambda plan_id: Story(read_report_facts(still, still.read_plan(plan_id)), write=write),
    )
    head = still.ledger.head()
    return {
        "told": told,
        "behind": done.behind,
        "notes": [*done.notes, *unwritten],
        "ledger_head": head.digest if head else None,
    }
