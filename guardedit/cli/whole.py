"""The Typer application with all commands, and how errors end it."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from guardedit.cli import (
    auditing,
    desk,
    edits,
    evaluation,
    guarding,
    keys,
    policies,
    prepare,
    record,
    remedi,
    review,
    tracing,
    tuning,
    upkeep,
)
from guardedit.cli.common import app
from guardedit.cli.glance import tame
from guardedit.errors import GuardeditError

__all__ = ["app", "main"]

_COMMANDS = (
    auditing, desk, edits, evaluation, guarding, keys, policies, prepare, record, remedi, review, tracing, tuning,
    upkeep,
)  # fmt: skip
# Typer brings its own copy of click since 0.21 and uses the real one before: both are reached through Typer.
_Misuse: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
INTERRUPTED = 130
"""What shells call a program that was ended by Ctrl-C; newer versions of Typer end with it too, without a word."""
_INTERRUPTED = "interrupted; nothing is live that was not before, or it is on record: see `guardedit status`"


def main() -> None:
    """Run the command line; whatever goes wrong is one line on stderr and its own exit code."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except GuardeditError as error:
        code = _failed(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _failed(_INTERRUPTED, INTERRUPTED)
    except _Misuse as error:
        code = _misused(error)
    except BrokenPipeError:
        # Whoever read our output has had enough; nothing may be written there again, not even at exit.
        sys.stdout = None
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _failed(message: str, exit_code: int) -> int:
    """Say it once, on stderr, in the form that was asked for."""
    line = tame(" ".join(message.split()))
    if _as_json():
        typer.echo(json.dumps({"error": line, "exit_code": exit_code}, ensure_ascii=False), err=True)
    else:
        typer.echo(f"guardedit: {line}", err=True)
    return exit_code


def _misused(error: Any) -> int:
    code = int(error.exit_code)
    if _as_json():
        return _failed(error.format_message(), code)
    error.show()
    return code


def _as_json() -> bool:
    """A command that could not be parsed has no options yet, so the words themselves are looked at."""
    return "--json" in sys.argv[1:]
