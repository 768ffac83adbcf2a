"""Commands on policy files: policy show, sign, list, withdraw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from guardedit.cli.common import (
    HomeOption,
    JsonOption,
    KeyOption,
    KeysOption,
    ModelOption,
    app,
    emit,
    from_context,
)

policy = typer.Typer(
    help="Levels that ship with the model, and policy owners' words on policy files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(policy, name="policy")


@policy.command("show")
def show(
    context: typer.Context,
    named: Annotated[
        Path | None,
        typer.Argument(
            metavar="LEVEL|FILE", help="strict, standard, permissive, or a file; none lists the levels."
        ),
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a policy as TOML, to be read, changed and named with --policy; without a name, list the model's levels."""
    from guardedit.pipeline.policies import levels_of, shown_policy

    options = from_context(context, model, home, as_json)
    name = options.history().settings.model
    if named is None:
        found = levels_of(name)
        lines = [f"{row['level']:10} {row['rules']:3} rules  {row['digest'][:19]}…" for row in found]
        emit(options, {"levels": found}, "\n".join(lines) or f"{name} ships no policy")
        return
    text = shown_policy(name, named)
    emit(options, {"policy": str(named), "toml": text}, text.rstrip("\n"))


@policy.command("sign")
def sign(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="A policy file or a level; without one, the standard level.")
    ] = None,
    key: KeyOption = None,
    folder: KeysOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a policy owner's signature under a policy; from then on the home is judged by signed policies alone."""
    from guardedit.pipeline.policies import sign_policy

    options = from_context(context, model, home, as_json, key=key, keys=folder)
    found = sign_policy(options.guard(), file)
    emit(options, found, _line(found))


@policy.command("list")
def list_policies(
    context: typer.Context, model: ModelOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Policies that the home's policy owners have signed, and which of them count."""
    from guardedit.pipeline.policies import listed_policies

    options = from_context(context, model, home, as_json)
    found = listed_policies(options.guard())
    text = "\n".join(_line(row) for row in found) or "no policy owner of this home has signed a policy"
    emit(options, {"policies": found}, text)


@policy.command("withdraw")
def withdraw(
    context: typer.Context,
    digest: Annotated[str, typer.Argument(help="The policy's digest, or its first digits.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; goes on record.")],
    key: KeyOption = None,
    folder: KeysOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a policy out of use; one policy owner is enough, and it can be signed again."""
    from guardedit.pipeline.policies import withdraw_policy

    options = from_context(context, model, home, as_json, key=key, keys=folder)
    found = withdraw_policy(options.guard(), digest, reason)
    emit(options, found, _line(found))


def _line(row: dict[str, Any]) -> str:
    from guardedit.cli.words import clean

    signers = ", ".join(row["signed_by"]) or "nobody"
    state = "counts" if row["counts"] else f"does not count: {row['problem']}"
    return f"{clean(row['name'])} {row['policy_digest'][:19]}…  signed by {signers}; {state}"
