"""Commands for auditors: audit, schema; and what `verify FILE` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from guardedit.cli.common import HomeOption, JsonOption, ModelOption, Options, app, emit, from_context


@app.command()
def audit(
    context: typer.Context,
    since: Annotated[
        str | None, typer.Option("--since", help="From this time on, ISO 8601 (UTC where no zone is said).")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Up to, not including, this time.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("audit"),
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report on a period: edits, decisions, waivers, incidents, drift, the chain. Writes audit.json, .md, .html and
    model_card.md."""
    from guardedit.audit.period_report import render
    from guardedit.audit.period_sheet import sheet_of
    from guardedit.pipeline.auditing import audit as draw
    from guardedit.pipeline.auditing import period_of

    options = from_context(context, model, home, as_json)
    made = draw(options.guard(), period_of(since, until))
    files = render(made, out)
    story = sheet_of(made).story
    document: dict[str, Any] = {
        "verdict": story.sign.word,
        "summary": story.headline,
        "edits": len(made.evidence.edits),
        "open": [item.plan_id for item in made.evidence.open],
        "incidents": len(made.evidence.incidents),
        "evidence_digest": made.evidence_digest,
        "ledger_head": made.evidence.chain.head_digest,
        "files": {name: str(path) for name, path in vars(files).items()},
    }
    lines = [
        f"{story.sign.icon} {story.sign.word}. {story.headline}",
        *story.others,
        *story.decided,
        story.action,
    ]
    lines += [f"evidence: {made.evidence_digest}", f"report: {files.html}"]
    emit(options, document, "\n".join(lines))


@app.command()
def schema(
    kind: Annotated[
        Literal["report", "audit"], typer.Argument(help="report.json of one edit, or audit.json of a period.")
    ],
) -> None:
    """Print the JSON Schema of a report file."""
    from guardedit.audit.schemas import schema_text

    typer.echo(schema_text(kind), nl=False)


def verify_report(options: Options, path: Path, alone: bool, anchor: Path | None = None) -> None:
    """Check one file, against the home's ledger where there is one; print what was checked."""
    from guardedit.audit.importing import is_export
    from guardedit.errors import NotFoundError
    from guardedit.pipeline.auditing import verify_file
    from guardedit.pipeline.exchanging import verify_export

    ledger = options.home / "ledger.sqlite"
    there = not alone and (ledger.exists() or ledger.with_suffix(".head").exists())
    if not there and not alone and options.home != Options().home:
        raise NotFoundError(f"there is no ledger in {options.home}; give another --home, or --alone")
    guard = options.guard() if there else None
    if is_export(path):
        found = verify_export(path, guard, anchor)
    elif anchor is not None:
        raise typer.BadParameter(
            "--anchor goes with a whole home or an exported ledger, not with a report file"
        )
    else:
        found = verify_file(path, guard)
    where = f"and borne out by the ledger in {options.home}" if there else "by itself; no ledger was asked"
    text = f"{path}: unchanged, {where}\nchecked: {', '.join(found['checked'])}\ndigest: {found['digest']}"
    emit(options, found, text)
