"""The command line: parse, call, print, exit code. Nothing heavy is imported before a command needs it.

`glance` answers the quickest questions; `whole` is the Typer application with all commands.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; whatever goes wrong is one line on stderr and its own exit code."""
    from guardedit.cli.glance import answer

    text = answer(sys.argv[1:])
    if text is None:
        from guardedit.cli.whole import main as whole

        whole()
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read our output has had enough; nothing may be written there again, not even at exit.
        sys.stdout = None
    sys.exit(0)


def __getattr__(name: str) -> Any:
    if name == "app":
        from guardedit.cli.whole import app

        return app
    raise AttributeError(f"module 'guardedit.cli' has no attribute {name!r}")
