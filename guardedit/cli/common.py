"""What every command shares: the application, its options, and how results are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardedit.cli.glance import document_text, tame
from guardedit.config import key_passphrase

if TYPE_CHECKING:
    from rich.console import Console

    from guardedit.pipeline import Guard
    from guardedit.pipeline.history import History

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
TrackingOption = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow: sqlite:///FILE or a server. Default: a file in the home."),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option("--device-map", help="Spread the model over devices, as accelerate does: auto, balanced, …"),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy", help="A policy file, or a level of the model's kit: strict, standard, permissive."
    ),
]
KeyOption = Annotated[
    str | None, typer.Option("--key", help="Name of your private key to sign with. Default: $GUARDEDIT_KEY")
]
KeysOption = Annotated[
    Path | None, typer.Option("--keys", help="Folder of private keys. Default: $GUARDEDIT_KEYS")
]
HparamsOption = Annotated[
    Path | None, typer.Option("--hparams", help="A settings file, .toml or .json, as `tune` writes it.")
]
PlanArgument = Annotated[str, typer.Argument(help="A plan's name, as `guardedit status` lists it.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; goes on record.")]
DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Options:
    """Options that stand before the verb or after it; after wins."""

    named_model: str | None = None
    home: Path = Path(".guardedit")
    as_json: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model that was named, with a path made absolute; else the default."""
        from guardedit.pipeline.kit import full_name

        return full_name(self.named_model or DEFAULT_MODEL)

    def guard(self) -> Guard:
        """The workspace; where no model is named, that of the model which the home guards."""
        from guardedit.pipeline import open as open_guard
        from guardedit.pipeline.upkeep import guarded_model

        model = self.named_model or guarded_model(self.home) or DEFAULT_MODEL
        guard = open_guard(model, self.home, **self.extra)
        guard.ask = Asking()
        return guard

    def history(self) -> History:
        """The record of the home, for what needs no model: quick, since torch stays away."""
        from guardedit.config import Settings
        from guardedit.pipeline.history import History
        from guardedit.pipeline.upkeep import guarded_model

        model = self.named_model or guarded_model(self.home) or DEFAULT_MODEL
        history = History(Settings(model=model, home=self.home, **self.extra))
        history.ask = Asking()
        return history


class Asking:
    """Asks for a key's passphrase, once: $GUARDEDIT_KEY_PASSPHRASE, else whoever is at the terminal."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def __call__(self, name: str, confirm: bool = False) -> str | None:
        """The passphrase of that key; None where nobody can be asked."""
        named = key_passphrase()
        if named is not None or not sys.stdin.isatty():
            return named
        if name not in self._said:
            self._said[name] = typer.prompt(
                f"passphrase of key {name}", hide_input=True, err=True, confirmation_prompt=confirm
            )
        return self._said[name]


@app.callback()
def _before_the_verb(
    context: typer.Context,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
    tracking_uri: TrackingOption = None,
    device_map: DeviceMapOption = None,
) -> None:
    context.obj = merged(Options(), model, home, as_json, tracking_uri=tracking_uri, device_map=device_map)


def merged(options: Options, model: str | None, home: Path | None, as_json: bool, **extra: Any) -> Options:
    """Options with those that were given put on top."""
    named = {name: value for name, value in extra.items() if value is not None}
    return replace(
        options,
        named_model=model or options.named_model,
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
    typer.echo(document_text(document) if options.as_json else tame(text))


def console() -> Console:
    """Where progress and remarks go: stderr, so that stdout stays clean."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def tell_of(record: History, *plan_ids: str) -> None:
    """Show plans on the MLflow server that was named, if one was; where that fails, one line on stderr says so."""
    from guardedit.pipeline.telling import tell_server

    problem = tell_server(record, plan_ids)
    if problem is not None:
        line = f"MLflow does not show this yet; `guardedit sync` catches up. {problem}"
        console().print(tame(line), markup=False, soft_wrap=True)


@contextmanager
def working(guard: Guard) -> Iterator[None]:
    """Show on stderr what the workspace is doing, if that is a terminal."""
    err = console()
    if not err.is_terminal:
        yield
        return
    status = err.status("starting")
    guard.progress = lambda what, _: status.update(what)
    with status:
        yield
