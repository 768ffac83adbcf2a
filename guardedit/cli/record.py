"""Commands on the record as a whole: ledger export, ledger import, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from guardedit.cli.common import HomeOption, JsonOption, ModelOption, app, emit, from_context, working

ledger = typer.Typer(
    help="The ledger as a file: export it, import it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(ledger, name="ledger")


@ledger.command("export")
def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A file of JSON lines to write.")],
    blobs: Annotated[bool, typer.Option("--blobs", help="With plans and solved updates.")] = False,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write every entry, the head and the newest checkpoint to a file that `verify FILE` checks without this home."""
    from guardedit.pipeline.exchanging import export_ledger

    options = from_context(context, model, home, as_json)
    found = export_ledger(options.guard(), file, blobs)
    emit(options, found, f"{file}: {found['entries']} entries, {found['files']} files\nhead: {found['head']}")


@ledger.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A file that `ledger export` wrote.")],
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put an exported ledger into an empty home, once its chain, signatures and files have been checked."""
    from guardedit.pipeline.exchanging import import_ledger

    options = from_context(context, model, home, as_json)
    found = import_ledger(options.guard(), file)
    emit(options, found, f"{found['home']}: {found['entries']} entries\nhead: {found['head']}")


@app.command()
def reproduce(
    context: typer.Context,
    edit_id: Annotated[str, typer.Argument(help="A plan or an edit.")],
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Relative Frobenius distance that is still the same.")
    ] = 1e-3,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Solve an edit again from what is on record, on the version its plan names, and say how close that comes."""
    from guardedit.errors import IntegrityError
    from guardedit.pipeline.reproducing import reproduce as solve_again

    options = from_context(context, model, home, as_json)
    guard = options.guard()
    with working(guard):
        found = solve_again(guard, edit_id, tolerance)
    emit(options, found, _reproduced(found))
    if not found["within_tolerance"]:
        raise typer.Exit(IntegrityError.exit_code)


def _reproduced(found: dict[str, Any]) -> str:
    verdict = "bit-identical" if found["bit_identical"] else (
        "the same within the tolerance" if found["within_tolerance"] else "NOT REPRODUCED"
    )  # fmt: skip
    far = "not comparable" if found["distance"] is None else f"{found['distance']:.2e}"
    lines = [f"{found['edit_id']}: {verdict} (relative distance {far}, tolerance {found['tolerance']:g})"]
    lines += [
        f"  {row['tensor']}: " + ("bit-identical" if row["bit_identical"] else _far(row["distance"]))
        for row in found["tensors"]
    ]
    here = found["platform"]
    lines += [f"  solved with {found['editor']} on version {found['version']}, seed {found['seed']}"]
    lines += [f"  here: {here['machine']}, {here['threads']} threads, torch {here['torch']}"]
    lines += [f"  another {name} than then: {change}" for name, change in found["differs"].items()]
    return "\n".join(lines)


def _far(distance: float | None) -> str:
    return "not comparable" if distance is None else f"relative distance {distance:.2e}"
