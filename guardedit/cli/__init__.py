"""The command line: parse, call, print, exit code. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys

import typer

from guardedit.cli import edits, prepare, upkeep
from guardedit.cli.common import app
from guardedit.errors import GuardeditError

__all__ = ["app", "main"]

_COMMANDS = (edits, prepare, upkeep)


def main() -> None:
    """Run the command line; a guardedit error is one line on stderr and its own exit code."""
    try:
        app()
    except GuardeditError as error:
        typer.echo(f"guardedit: {error}", err=True)
        sys.exit(error.exit_code)
