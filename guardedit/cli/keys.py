"""Commands on keys and what they sign: keys new, list, trust, revoke; checkpoint; reviewed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from guardedit.cli.common import (
    Asking,
    HomeOption,
    JsonOption,
    KeyOption,
    KeysOption,
    ModelOption,
    app,
    emit,
    from_context,
)

keys = typer.Typer(
    help="Ed25519 keys: yours, and those that a home trusts.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(keys, name="keys")

RoleOption = Annotated[
    Literal["reviewer", "proposer", "runner", "break-glass", "policy-owner", "auditor"],
    typer.Option("--role", help="What its signature may do; one role a call."),
]


@keys.command("new")
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a-z, 0-9, dots, dashes.")],
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase", help="Encrypt the private half; asked for, or in $GUARDEDIT_KEY_PASSPHRASE."
        ),
    ] = False,
    folder: KeysOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key pair: NAME.pem for you alone, NAME.pub to hand on."""
    from guardedit.gate.keys import new_key
    from guardedit.pipeline.signing import folder_of

    options = from_context(context, None, None, as_json, keys=folder)
    where = folder_of(options.guard())
    made = new_key(where, name, _new_passphrase(name) if passphrase else None)
    document = {
        "name": name, "key_id": made.key_id, "public_file": str(where / f"{name}.pub"), "encrypted": passphrase,
    }  # fmt: skip
    emit(options, document, f"{name}: {made.key_id}\npublic half: {document['public_file']}")


def _new_passphrase(name: str) -> str:
    from guardedit.errors import BadRequestError

    said = Asking()(name, confirm=True)
    if said is None:
        raise BadRequestError("--passphrase: nobody can be asked here; set $GUARDEDIT_KEY_PASSPHRASE")
    return said


@keys.command("list")
def list_keys(
    context: typer.Context, folder: KeysOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Keys that the home trusts or has revoked, as its ledger says, and your own."""
    from guardedit.pipeline.signing import listed

    options = from_context(context, None, home, as_json, keys=folder)
    found = listed(options.guard())
    lines = [
        f"{row['name']:20} {row['key_id'][:16]}  {', '.join(row['roles'])}"
        + (f"  REVOKED: {row['reason']}" if row["revoked"] else "")
        for row in found["trusted"]
    ] or ["this home trusts no key: approvals are names that nobody checks"]
    lines += [f"yours: {name:13} {key_id[:16]}" for name, key_id in found["own"].items()]
    emit(options, found, "\n".join(lines))


@keys.command("trust")
def trust(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A public key, as `keys new` writes it.")],
    role: RoleOption,
    name: Annotated[str | None, typer.Option("--name", help="Whose it is; without it, the file's.")] = None,
    key: KeyOption = None,
    folder: KeysOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Trust a public key in a role; once there is a policy owner, only with that key."""
    from guardedit.pipeline.signing import missing_owners, trust_key

    options = from_context(context, None, home, as_json, key=key, keys=folder)
    guard = options.guard()
    word = trust_key(guard, file, role, name)
    missing = missing_owners(guard, word)
    said = f"is trusted as {word.role}"
    if missing:
        said = f"waits to be trusted as {word.role}: {missing} more policy owner(s) have to say the same"
    emit(
        options, {**word.model_dump(), "missing_owners": missing}, f"{word.name} ({word.key_id[:16]}) {said}"
    )


@keys.command("revoke")
def revoke(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A trusted key's name or id.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; goes on record.")],
    key: KeyOption = None,
    folder: KeysOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Trust a key no longer, for good; its approvals that nobody has applied count no more."""
    from guardedit.pipeline.signing import revoke_key

    options = from_context(context, None, home, as_json, key=key, keys=folder)
    word = revoke_key(options.guard(), name, reason)
    emit(options, word.model_dump(), f"{word.name} ({word.key_id[:16]}) is revoked: {word.reason}")


@app.command()
def checkpoint(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="A file to keep elsewhere.")] = None,
    key: KeyOption = None,
    folder: KeysOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the ledger's head to a file, signed by a runner's key; `verify --anchor FILE` holds the ledger to it."""
    from guardedit.pipeline.anchoring import checkpoint as write

    options = from_context(context, model, home, as_json, key=key, keys=folder)
    found = write(options.guard(), out)
    signed = "signed" if found["signed"] else "unsigned"
    emit(options, found, f"{found['file']}: entry {found['seq']}, {found['digest']} ({signed})")


@app.command()
def reviewed(
    context: typer.Context,
    plan_id: Annotated[str, typer.Argument(help="A plan that an emergency word let through.")],
    note: Annotated[str, typer.Option("--note", help="What the review found; goes on record.")],
    key: KeyOption = None,
    folder: KeysOption = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close the review that follows a break-glass approval, with another reviewer's or auditor's key."""
    from guardedit.pipeline.anchoring import review

    options = from_context(context, model, home, as_json, key=key, keys=folder)
    found = review(options.guard(), plan_id, note)
    emit(options, found, f"{plan_id}: reviewed by {found['by']}: {found['note']}")
