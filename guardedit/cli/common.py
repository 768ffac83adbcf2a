"""What every command shares: the application, its options, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from guardedit.pipeline import Guard

app = typer.Typer(
    name="guardedit",
    help="Plan, measure, judge, apply, monitor and undo edits of what a language model knows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Known name, Hugging Face folder or hub id.")
]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Versions, plans, ledger. Default: .guardedit")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@dataclass(frozen=True)
class Options:
    """Options that stand before the verb or after it; after wins."""

    model: str = "smollm2-135m"
    home: Path = Path(".guardedit")
    as_json: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def guard(self) -> Guard:
        """A workspace with a progress line on stderr."""
        from guardedit.pipeline import open as open_guard

        return open_guard(self.model, self.home, **self.extra)


@app.callback()
def _before_the_verb(
    context: typer.Context,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    context.obj = merged(Options(), model, home, as_json)


def merged(options: Options, model: str | None, home: Path | None, as_json: bool, **extra: Any) -> Options:
    """Options with those that were given put on top."""
    named = {name: value for name, value in extra.items() if value is not None}
    return replace(
        options,
        model=model or options.model,
        home=home or options.home,
        as_json=as_json or options.as_json,
        extra={**options.extra, **named},
    )


def from_context(
    context: typer.Context, model: str | None, home: Path | None, as_json: bool, **extra: Any
) -> Options:
    """The options of one command."""
    return merged(context.obj or Options(), model, home, as_json, **extra)


def emit(options: Options, document: dict[str, Any], text: str) -> None:
    """Print the JSON document, or the text for people."""
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False, default=str) if options.as_json else text)


def console() -> Console:
    """Where progress and remarks go: stderr, so that stdout stays clean."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def working(guard: Guard) -> Iterator[None]:
    """Show on stderr what the workspace is doing."""
    status = console().status("starting")
    guard.progress = lambda what, _: status.update(what)
    with status:
        yield
