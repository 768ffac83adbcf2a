"""Commands for whoever reviews: approve, reject, review, replan."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardedit.cli.common import (
    HomeOption,
    JsonOption,
    KeyOption,
    KeysOption,
    ModelOption,
    Options,
    PlanArgument,
    PolicyOption,
    ReasonOption,
    TrackingOption,
    app,
    emit,
    from_context,
    tell_of,
    working,
)

if TYPE_CHECKING:
    from guardedit.pipeline.reviewing import Waiting


@app.command()
def approve(
    context: typer.Context,
    plan_id: PlanArgument,
    reason: ReasonOption,
    break_glass: Annotated[
        bool, typer.Option("--break-glass", help="Let a blocked plan through, in an emergency.")
    ] = False,
    ticket: Annotated[str, typer.Option("--ticket", help="What the emergency is filed under.")] = "",
    hours: Annotated[float, typer.Option("--hours", help="How long the emergency word counts.")] = 4.0,
    key: KeyOption = None,
    keys: KeysOption = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Approve a plan that waits for a person, or a held edit; bound to the plan's digest."""
    from guardedit.pipeline.deciding import Emergency, decide_plan

    options = from_context(context, model, home, as_json, key=key, keys=keys, tracking_uri=tracking_uri)
    emergency = Emergency(ticket, hours) if break_glass else None
    record = options.history()
    word = decide_plan(record, plan_id, "approved", reason, emergency=emergency)
    _decided(options, word.model_dump())
    tell_of(record, plan_id)


@app.command()
def reject(
    context: typer.Context,
    plan_id: PlanArgument,
    reason: ReasonOption,
    key: KeyOption = None,
    keys: KeysOption = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reject a plan or a held edit."""
    from guardedit.pipeline.deciding import decide_plan

    options = from_context(context, model, home, as_json, key=key, keys=keys, tracking_uri=tracking_uri)
    record = options.history()
    _decided(options, decide_plan(record, plan_id, "rejected", reason).model_dump())
    tell_of(record, plan_id)


def _decided(options: Options, word: dict[str, Any]) -> None:
    from guardedit.cli.words import signature

    named = f"plan {word['plan_digest']}"
    named += f", monitor's report {word['drift_digest']}" if word["drift_digest"] else ""
    emit(
        options,
        word,
        f"{word['outcome']} by {word['approver']} ({signature(word)}): {word['reason']} ({named})",
    )


@app.command()
def replan(
    context: typer.Context,
    plans: Annotated[
        list[str] | None,
        typer.Argument(help="Plans to make anew; none: all that are stale, expired or out of date."),
    ] = None,
    policy: PolicyOption = None,
    key: KeyOption = None,
    keys: KeysOption = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make waiting or stale plans anew on today's model, and show what is different; the old ones are superseded."""
    from guardedit.cli.differences import difference_text
    from guardedit.cli.words import plan_document

    named = {"policy": policy, "key": key, "keys": keys, "tracking_uri": tracking_uri}
    options = from_context(context, model, home, as_json, **named)
    guard = options.guard()
    with working(guard):
        found = guard.replan(*plans or ())
        tell_of(guard, *(plan_id for one in found if one.new for plan_id in (one.old, one.new.plan_id)))
    documents: list[dict[str, Any]] = []
    lines, code = [], 0
    for one in found:
        if one.new is None:
            error = str(one.problem)
            documents.append({"old": one.old, "new": None, "problem": error})
            lines.append(f"plan {one.old} cannot be made anew: {error}")
            code = max(code, one.problem.exit_code if one.problem else 2)
            continue
        documents.append({**one.difference, "plan": plan_document(one.new)})
        lines.append(f"plan {one.new.plan_id}   {one.new.digest[:19]}…\n{difference_text(one.difference)}")
        code = max(code, {"auto-approved": 0, "blocked": 3, "needs-approval": 4}[one.new.judgement.outcome])
    emit(options, {"replanned": documents}, "\n\n".join(lines) or "nothing is stale, expired or out of date")
    raise typer.Exit(code)


@app.command()
def review(
    context: typer.Context,
    key: KeyOption = None,
    keys: KeysOption = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Walk through what waits for a person: approve, reject, skip or quit. With --json the queue is listed, no more."""
    from guardedit.errors import BadRequestError
    from guardedit.pipeline.reviewing import queue, waiting

    options = from_context(context, model, home, as_json, key=key, keys=keys, tracking_uri=tracking_uri)
    record = options.history()
    if options.as_json:
        emit(options, {"queue": [_document(waiting(record, plan_id)) for plan_id in queue(record)]}, "")
        return
    if not sys.stdin.isatty():
        raise BadRequestError(
            "review asks questions, and stdin is no terminal; use `guardedit approve` or `guardedit reject`"
        )
    from guardedit.cli.briefing import Desk

    desk = Desk(record)
    desk.walk(queue(record))
    tell_of(record, *desk.decided)


def _document(one: Waiting) -> dict[str, Any]:
    from guardedit.cli.words import plan_document

    return {
        **plan_document(one.plan),
        "state": one.state,
        "decisions": list(one.words),
        "difference": one.difference,
        "postop": one.postop.model_dump(mode="json") if one.postop else None,
        "drift_digest": one.drift_digest,
    }
