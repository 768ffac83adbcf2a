"""Commands on edits: plan, show, try, apply, rollback, report, demo."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from guardedit.cli.common import (
    HomeOption,
    HparamsOption,
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

WaiveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--waive", help="A soft pre-op metric to lift, e.g. preop/leakage; needs --reason. Repeatable."
    ),
]


@app.command()
def demo(
    context: typer.Context,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
    reports: Annotated[Path | None, typer.Option("--reports", help="Folder for the audit reports.")] = None,
    tracking_uri: TrackingOption = None,
    chapter: Annotated[
        Literal["edits", "context"],
        typer.Option("--chapter", help="Three edits through the gate, or a fact that holds inside a story."),
    ] = "edits",
) -> None:
    """Three real edits on the default model: one that passes, one that the gate stops, and fine-tuning.

    With --chapter context: a fact that is true inside a story and false outside of it, as turns of a chat.
    """
    from guardedit.demo import Demo
    from guardedit.demo_context import ContextDemo

    options = from_context(context, model, home, as_json, reports=reports, tracking_uri=tracking_uri)
    kind = ContextDemo if chapter == "context" else Demo
    kind(options.guard(), quiet=options.as_json).show()


@app.command()
def plan(
    context: typer.Context,
    requests: Annotated[
        Path, typer.Argument(help="YAML or JSON (one request, or a list of them), or JSON lines (.jsonl).")
    ],
    editor: Annotated[
        str,
        typer.Option(
            "--editor",
            help="rome, guarded, emmet, memit, alphaedit, finetune, finetune-l, finetune-full or lora.",
        ),
    ] = "rome",
    each: Annotated[
        bool, typer.Option("--each", help="A plan for each request, also with a joint editor.")
    ] = False,
    waive: WaiveOption = None,
    reason: ReasonOption = "",
    expires: Annotated[
        str, typer.Option("--expires", help="How long waivers count: 8h, 7d or a time.")
    ] = "8h",
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything sampled.")] = None,
    hparams: HparamsOption = None,
    policy: PolicyOption = None,
    key: KeyOption = None,
    keys: KeysOption = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Solve the requests, measure what else they would change, judge it; nothing is written to the model."""
    from guardedit.gate.approvals import make_waiver
    from guardedit.pipeline.asking import understood
    from guardedit.pipeline.hparams import read_hparams
    from guardedit.pipeline.reading import read_requests

    named = {"seed": seed, "policy": policy, "key": key, "keys": keys, "tracking_uri": tracking_uri}
    options = from_context(context, model, home, as_json, **named)
    asked = read_requests(requests)
    settings, guard = read_hparams(hparams, editor), options.guard()
    guard.kit.settings(editor, settings)
    now = datetime.now(UTC)
    waivers = [make_waiver(metric, guard.user, reason, expires, now) for metric in waive or ()]
    with working(guard):
        groups = understood(guard, asked, editor, each)
        plans = [guard.plan(group, editor, waivers, settings) for group in groups]
        tell_of(guard, *(made.plan_id for made in plans))
    from guardedit.cli.words import plan_document, plan_text

    document: dict[str, Any] = {"plans": [plan_document(made) for made in plans]}
    emit(options, document, "\n\n".join(plan_text(made) for made in plans))
    codes = {"auto-approved": 0, "blocked": 3, "needs-approval": 4}
    raise typer.Exit(max(codes[made.judgement.outcome] for made in plans))


@app.command()
def show(
    context: typer.Context,
    plan_id: PlanArgument,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """A plan in words: the edit, the limits, and what would be disturbed."""
    from guardedit.cli.differences import difference_text
    from guardedit.cli.words import decisions_text, plan_document, plan_text
    from guardedit.pipeline.reviewing import difference_of, successor

    options = from_context(context, model, home, as_json)
    record = options.history()
    made = record.read_plan(plan_id)
    words = [e.body["decision"] for e in record.history(plan_id) if e.body.get("decision")]
    told, by = difference_of(record, plan_id), successor(record, plan_id)
    document = {**plan_document(made), "state": record.state(plan_id), "decisions": words}
    document |= {"difference": told, "superseded_by": by}
    lines = [plan_text(made) + decisions_text(words)]
    lines += [difference_text(told)] if told else []
    lines += [f"  superseded by {by}"] if by else []
    emit(options, document, "\n".join(lines))


@app.command("try")
def try_plan(
    context: typer.Context,
    plan_id: PlanArgument,
    prompt: Annotated[str, typer.Argument(help="A prompt to continue, before and after the edit.")],
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens to write.")] = 20,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with the live model and as the plan would have it, side by side; nothing is written.

    Of a held edit the staged copy is read, else the plan's update runs as a hook.
    """
    from guardedit.cli.differences import side_by_side
    from guardedit.pipeline.trying import tried

    options = from_context(context, model, home, as_json)
    guard = options.guard()
    with working(guard):
        found = tried(guard, plan_id, prompt, tokens)
    document = {"plan_id": plan_id, "prompt": prompt, **vars(found)}
    heads = ("before: the live model", f"after: {found.source}")
    emit(options, document, side_by_side(heads, (prompt + found.before, prompt + found.after)))


@app.command()
def apply(
    context: typer.Context,
    plan_id: PlanArgument,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Monitor on 60k control tokens instead of 8k.")
    ] = False,
    policy: PolicyOption = None,
    key: KeyOption = None,
    keys: KeysOption = None,
    reports: Annotated[Path | None, typer.Option("--reports", help="Folder for the audit report.")] = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage the plan, monitor the staged copy, then commit it or drop it."""
    asked = {"thorough": thorough or None, "policy": policy, "reports": reports, "tracking_uri": tracking_uri}
    asked |= {"key": key, "keys": keys}
    options = from_context(context, model, home, as_json, **asked)
    guard = options.guard()
    with working(guard):
        audit = guard.apply(plan_id)
    _finish(options, guard, plan_id, audit.outcome)


@app.command()
def rollback(
    context: typer.Context,
    edit_id: Annotated[str, typer.Argument(help="A committed or held edit.")],
    reason: ReasonOption = "asked for",
    reports: Annotated[Path | None, typer.Option("--reports", help="Folder for the audit report.")] = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take an edit back, bit for bit."""
    options = from_context(context, model, home, as_json, reports=reports, tracking_uri=tracking_uri)
    guard = options.guard()
    with working(guard):
        guard.rollback(edit_id, reason)
    _finish(options, guard, edit_id, None)


def _finish(options: Options, guard: Any, edit_id: str, outcome: str | None) -> None:
    """Publish the report, print what became of the edit, and end with its exit code."""
    from guardedit.cli.words import edit_document, edit_text

    with working(guard):
        published = guard.report(edit_id)
    emit(options, edit_document(published), edit_text(published))
    raise typer.Exit({"rolled-back": 5, "held": 9}.get(outcome or "", 0))


@app.command()
def report(
    context: typer.Context,
    edit_id: Annotated[str, typer.Argument(help="An edit or plan.")],
    form: Annotated[
        Literal["html", "pdf"],
        typer.Option("--format", help="pdf adds report.pdf to the three; it needs the extra guardedit[pdf]."),
    ] = "html",
    reports: Annotated[Path | None, typer.Option("--reports", help="Folder for the audit report.")] = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an edit's report again: json, markdown, html, and on demand pdf."""
    options = from_context(context, model, home, as_json, reports=reports, tracking_uri=tracking_uri)
    guard = options.guard()
    if form == "pdf":
        _finish_as_pdf(options, guard, edit_id)
    else:
        _finish(options, guard, edit_id, None)


def _finish_as_pdf(options: Options, guard: Any, edit_id: str) -> None:
    """Publish the report and print its page; what a PDF needs is looked for before anything is written."""
    from guardedit.audit.pdf import load_printer, write_pdf
    from guardedit.cli.words import edit_document, edit_text

    printer = load_printer()
    with working(guard):
        published = guard.report(edit_id)
        made = write_pdf(published.files.html, published.files.html.with_suffix(".pdf"), printer)
    emit(options, {**edit_document(published), "pdf": str(made)}, f"{edit_text(published)}\n{made}")
