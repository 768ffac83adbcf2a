"""Commands of the reviewers' desk: serve, collect, desk roles."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from guardedit.cli.common import (
    HomeOption,
    JsonOption,
    ModelOption,
    Options,
    TrackingOption,
    app,
    console,
    emit,
    from_context,
    tell_of,
)

desk_app = typer.Typer(name="desk", help="People and roles at MLflow's review queue.", no_args_is_help=True)
app.add_typer(desk_app)

_NO_LOGIN = (
    "answers in the Review tab do NOT count on this server: it has no login. Decide with `guardedit approve`, or start "
    "it with --login"
)


@app.command()
def serve(
    context: typer.Context,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on this machine.")] = 5000,
    login: Annotated[
        bool, typer.Option("--login", help="Ask for a login, so that answers count; needs guardedit[login].")
    ] = False,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start MLflow on this home's records (loopback only), at the queue of edits that wait for a person."""
    import subprocess

    from guardedit.pipeline.serving import prepared

    options = from_context(context, model, home, as_json, tracking_uri=tracking_uri)
    made = prepared(options.guard(), port, login)
    lines = [f"the queue: {made.queue}", *(f"{name}: {url}" for name, url in made.views.items())]
    lines += [f"not told: {note}" for note in made.notes]
    if not login:
        lines.append(_NO_LOGIN)
    document = {"address": made.address, "queue": made.queue, "views": made.views, "login": login,
                "tracking_uri": made.tracking_uri, "notes": list(made.notes)}  # fmt: skip
    emit(options, document, "\n".join(lines))
    raise typer.Exit(subprocess.call(made.command, env=made.environment))


@app.command()
def collect(
    context: typer.Context,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put on record what reviewers answered in MLflow's Review tab; only a server with a login makes answers count."""
    from guardedit.errors import GuardeditError, TrackingError
    from guardedit.pipeline import desk

    options = from_context(context, model, home, as_json, tracking_uri=tracking_uri)
    try:
        guard = options.guard()
        found = desk.collect(guard)
    except TrackingError as error:
        raise GuardeditError(f"MLflow was not reached: {error}. Nothing was put on record") from error
    emit(options, _document(found), "\n".join(_lines(found)))
    tell_of(guard, *(one.plan_id for one in found.answers if one.outcome != "refused"))
    raise typer.Exit(4 if desk.nothing_counted(found) else 0)


def _document(found: Any) -> dict[str, Any]:
    return {
        "login": found.login,
        "answers": [vars(one) for one in found.answers],
        "waiting": list(found.waiting),
    }


def _lines(found: Any) -> list[str]:
    lines = [
        f"{one.plan_id}: refused, from {one.by}: {one.reason}"
        if one.outcome == "refused"
        else f"{one.plan_id}: {one.outcome} by {one.by}: {one.reason}"
        for one in found.answers
    ]
    lines += [f"{plan_id}: nobody has answered" for plan_id in found.waiting]
    if not found.login:
        lines.append(_NO_LOGIN)
    return lines or ["nothing waits for a person"]


@desk_app.command("roles")
def roles(
    context: typer.Context,
    reviewer: Annotated[
        list[str] | None, typer.Option("--reviewer", help="A user of the server who may review. Repeatable.")
    ] = None,
    runner: Annotated[
        list[str] | None,
        typer.Option("--runner", help="A user who may write runs and may not review. Repeatable."),
    ] = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give people of an MLflow server with a login their roles, and reviewers their place at the queue.

    Needs an administrator's credentials in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    """
    from guardedit.errors import GuardeditError, TrackingError
    from guardedit.pipeline.serving import give_roles

    options = from_context(context, model, home, as_json, tracking_uri=tracking_uri)
    try:
        found = give_roles(options.guard(), reviewer or [], runner or [])
    except TrackingError as error:
        raise GuardeditError(str(error)) from error
    _told(options, found)


def _told(options: Options, found: dict[str, Any]) -> None:
    console().print(
        f"the queue takes answers of {', '.join(found['queue_users']) or 'nobody yet'}", markup=False
    )
    lines = [f"{role}: {', '.join(people) or 'nobody'}" for role, people in found["given"].items()]
    emit(options, found, "\n".join(lines))
