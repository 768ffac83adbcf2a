"""Starting MLflow at the queue, and giving people their places there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.audit.desk import reviews, roles, server, views
from guardedit.audit.tracking import prepare
from guardedit.errors import BadRequestError, TrackingError
from guardedit.pipeline.reporting import sync, tracker, tracking_uri
from guardedit.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Serving:
    """A server to be started."""

    address: str
    queue: str
    views: dict[str, str]
    """Name -> address of the saved views."""
    tracking_uri: str
    command: list[str]
    environment: dict[str, str]
    notes: tuple[str, ...]
    """Plans that could not be told."""


def prepared(workspace: Workspace, port: int, login: bool) -> Serving:
    """Bring the view up to date and say how the server is started. BadRequestError, TrackingError."""
    uri = tracking_uri(workspace)
    if uri.startswith(("http://", "https://")):
        raise BadRequestError(f"{uri} is a server already; `serve` starts one on a database")
    workspace.home.mkdir(parents=True, exist_ok=True)
    environment = server.environment(workspace.home, login)
    prepare(uri)
    notes = tuple(sync(workspace)["notes"])
    where = f"http://127.0.0.1:{port}"
    with tracker(workspace).at_desk(_model_name(workspace)) as (experiment, desk):
        views.write(desk.client, experiment)
        # The tables are written before the server runs, so the line under the question is ours to set.
        queue = reviews.Queue(desk.tracing, experiment, login)
        shown = {name: views.address(where, experiment, key) for key, (name, _, _) in views.VIEWS.items()}
        return Serving(
            where,
            reviews.address(where, experiment, queue),
            shown,
            uri,
            server.command(uri, _artifacts(workspace), port, login),
            environment,
            notes,
        )


def _artifacts(workspace: Workspace) -> Path:
    folder = (workspace.home / "mlflow-artifacts" / "artifacts").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _model_name(workspace: Workspace) -> str:
    """The name under which plans of this home are told."""
    if workspace.store.exists:
        return workspace.store.base().name
    return workspace.settings.model


def give_roles(workspace: Workspace, reviewers: list[str], runners: list[str]) -> dict[str, Any]:
    """Roles on a server with a login. BadRequestError where there is none, TrackingError where it refuses."""
    uri = tracking_uri(workspace)
    both = sorted({one.lower() for one in reviewers} & {one.lower() for one in runners})
    if both:
        raise BadRequestError(f"{', '.join(both)}: nobody both writes runs and reviews them")
    found = server.look(uri)
    if found is None or not found.login:
        raise BadRequestError(f"MLflow at {uri} has no login; start it with `guardedit serve --login`")
    if found.user is None:
        raise TrackingError("set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an administrator's")
    with tracker(workspace).at_desk(_model_name(workspace)) as (experiment, desk):
        given = roles.give(uri, experiment, {roles.REVIEWER: reviewers, roles.RUNNER: runners})
        return {"given": given, "queue_users": list(desk.queue.admit(reviewers))}
