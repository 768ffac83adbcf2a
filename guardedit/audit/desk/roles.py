"""Roles on an MLflow server with a login: who may review, and who may write runs but not review."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.server.auth.client import AuthServiceClient

WORKSPACE = "default"
REVIEWER, RUNNER = "guardedit-reviewer", "guardedit-runner"


def rights(experiment: str) -> dict[str, tuple[tuple[str, str, str], ...]]:
    """Role -> (resource, pattern, right). A reviewer cannot change runs, a runner cannot review."""
    return {
        REVIEWER: (
            # READ would do for the interface; MLflow's page gives no buttons to whoever may not edit the experiment.
            ("experiment", experiment, "EDIT"),
            ("run", "*", "READ"),
            ("trace", "*", "EDIT"),
            ("review_queue", "*", "EDIT"),
        ),
        RUNNER: (
            ("experiment", experiment, "EDIT"),
            ("assessment", "*", "DENY"),
            ("review_queue", "*", "DENY"),
        ),
    }


def give(uri: str, experiment: str, people: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Make the roles where they are missing and give them to people (role -> names of users that exist already).

    Needs the credentials of an administrator. Returns who has each role now. Giving a role twice changes nothing.
    """
    from mlflow.server import get_app_client

    client: AuthServiceClient = get_app_client("basic-auth", tracking_uri=uri)
    there = {role.name: role for role in client.list_roles(WORKSPACE)}
    given: dict[str, list[str]] = {}
    for name, wanted in rights(experiment).items():
        role = there.get(name) or client.create_role(WORKSPACE, name)
        _permit(client, int(role.id), wanted)
        given[name] = _assign(client, int(role.id), people.get(name, ()))
    return given


def _permit(client: AuthServiceClient, role: int, wanted: Iterable[tuple[str, str, str]]) -> None:
    there = {(p.resource_type, p.resource_pattern): p for p in client.list_role_permissions(role)}
    for kind, pattern, right in wanted:
        found = there.get((kind, pattern))
        if found is None:
            client.add_role_permission(role, kind, pattern, right)
        elif found.permission != right:
            client.update_role_permission(int(found.id), right)


def _assign(client: AuthServiceClient, role: int, people: Iterable[str]) -> list[str]:
    users = {client.get_user(name).username: client.get_user(name).id for name in people}
    there = {assignment.user_id for assignment in client.list_role_users(role)}
    for name, number in users.items():
        if number not in there:
            client.assign_role(name, role)
    return sorted(users)
