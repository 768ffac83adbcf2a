"""Commands on the record: status, log, verify, recover, doctor, sync, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from guardedit.cli.auditing import verify_report
from guardedit.cli.common import (
    DEFAULT_MODEL,
    HomeOption,
    JsonOption,
    ModelOption,
    TrackingOption,
    app,
    emit,
    from_context,
)


@app.command()
def status(
    context: typer.Context, model: ModelOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """What is live, and where every plan stands."""
    from guardedit.cli.glance import status_text
    from guardedit.pipeline.overview import overview

    options = from_context(context, model, home, as_json)
    found = overview(options.home, options.named_model or DEFAULT_MODEL)
    emit(options, found, status_text(found))


@app.command()
def log(
    context: typer.Context,
    edit_id: Annotated[str | None, typer.Argument(help="Only this edit.")] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The ledger, oldest first; the whole chain is checked before it is shown, unless nobody touched its file since
    the last check. With --json whole entries, always checked."""
    from guardedit.cli.glance import log_text
    from guardedit.pipeline.overview import slips_of

    options = from_context(context, model, home, as_json)
    if options.as_json:
        entries = options.history().ledger.entries(edit_id=edit_id)
        emit(options, {"entries": [vars(entry) for entry in entries]}, "")
    else:
        emit(options, {}, log_text(slips_of(options.home), edit_id))


@app.command()
def verify(
    context: typer.Context,
    report: Annotated[
        Path | None,
        typer.Argument(help="A report.json or audit.json; without one, the whole home is checked."),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Check the file by itself, also where a home is there.")
    ] = False,
    anchor: Annotated[
        Path | None, typer.Option("--anchor", help="A checkpoint that was kept elsewhere.")
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute every digest from bytes: ledger, versions, plans, deltas, the base model and its kit; or, of a report
    file, its schema, form and digests, and that the ledger bears it out."""
    options = from_context(context, model, home, as_json)
    if report is not None:
        if anchor is not None:
            raise typer.BadParameter("--anchor goes with a whole home, not with a report file")
        verify_report(options, report, alone)
        return
    if alone:
        raise typer.BadParameter("--alone goes with a report file")
    found = options.guard().verify(anchor)
    emit(options, found, "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items()))


@app.command()
def recover(
    context: typer.Context, model: ModelOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Finish or drop what a crash left."""
    options = from_context(context, model, home, as_json)
    found = options.guard().recover()
    lines = [f"{name}: {', '.join(values)}" for name, values in found.items() if values]
    emit(options, found, "\n".join(lines) or "nothing was left over")


@app.command()
def sync(
    context: typer.Context,
    reports: Annotated[Path | None, typer.Option("--reports", help="Folder of the audit reports.")] = None,
    tracking_uri: TrackingOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring MLflow to what the ledger says."""
    from guardedit.errors import GuardeditError, TrackingError

    options = from_context(context, model, home, as_json, reports=reports, tracking_uri=tracking_uri)
    try:
        found = options.guard().sync()
    except TrackingError as error:
        raise GuardeditError(
            f"MLflow was not reached: {error}. The ledger is complete; try again later"
        ) from error
    lines = [f"{plan_id}: told, run {run_id}" for plan_id, run_id in found["told"].items()]
    lines += [f"{note} (not told)" for note in found["notes"]]
    emit(options, found, "\n".join(lines) or "MLflow shows everything as the ledger has it")


@app.command()
def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the live model as a plain Hugging Face folder."""
    options = from_context(context, model, home, as_json)
    guard = options.guard()
    guard.export(folder)
    emit(
        options, {"folder": str(folder), "digest": guard.store.digest()}, f"{folder}: {guard.store.digest()}"
    )


@app.command()
def doctor(
    context: typer.Context, model: ModelOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """What this installation has: versions, model, kit, SAEs, ledger."""
    options = from_context(context, model, home, as_json)
    found = _diagnosis(options.guard())
    emit(options, found, "\n".join(f"{name:12} {value}" for name, value in found.items()))


def _diagnosis(guard: Any) -> dict[str, Any]:
    import torch

    from guardedit.errors import GuardeditError
    from guardedit.pipeline.workspace import versions

    found: dict[str, Any] = {
        **versions(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.is_available(),
    }
    checks: dict[str, Callable[[], str]] = {
        "model": lambda: f"{guard.handle.name} {guard.handle.digest()}",
        "kit": lambda: f"layer {guard.kit.layer}, {len(guard.kit.saes)} SAEs, policy {guard.kit.policy.name}",
        "ledger": lambda: f"{getattr(guard.ledger.verify(), 'seq', 0)} entries, chain intact",
    }
    for name, look in checks.items():
        try:
            found[name] = look()
        except GuardeditError as error:
            found[name] = f"PROBLEM: {error}"
    return found
