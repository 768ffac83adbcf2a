"""Commands on the record as a whole: ledger export, ledger import, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardedit.cli.common import HomeOption, JsonOption, ModelOption, app, emit, from_context

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
    emit(
        options, found, f"{file}: {found['entries']} entries, {found['files']} files\nhead: {found['head']}"
    )


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
