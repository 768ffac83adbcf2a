"""Checkpoints: the ledger's head at one moment, as a small file to keep elsewhere.

Who can write the home can rewrite ledger and head alike. A checkpoint that lies somewhere else shows it: the chain no
longer holds the entry that it names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from guardedit.audit.chain import Head
from guardedit.audit.files import make_folder, write_atomic
from guardedit.errors import IntegrityError, NotFoundError
from guardedit.records import Digest, Record, canonical

CHECKPOINT = "application/vnd.guardedit.checkpoint+json"


class Checkpoint(Record):
    """What is kept: number and digest of the last entry, and when it was looked at."""

    seq: int = Field(ge=1)
    """Number of the last entry, which is how many there are."""
    digest: Digest
    at: str
    key: str | None = None
    """Id of the runner's key that signed it."""

    @property
    def head(self) -> Head:
        """As `Ledger.verify` takes it."""
        return Head(self.seq, self.digest)


def write_checkpoint(path: Path, checkpoint: Checkpoint, envelope: dict[str, Any] | None) -> None:
    """Write the file. StorageError where that is not possible."""
    make_folder(path.parent)
    write_atomic(
        path, canonical({"checkpoint": checkpoint.model_dump(mode="json"), "envelope": envelope}) + b"\n"
    )


def read_checkpoint(path: Path) -> tuple[Checkpoint, dict[str, Any] | None]:
    """A checkpoint and its envelope. NotFoundError, or IntegrityError where the file is not one."""
    try:
        raw = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not a checkpoint, or was changed") from error
    return parse_checkpoint(raw, str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def parse_checkpoint(raw: Any, where: str) -> tuple[Checkpoint, dict[str, Any] | None]:
    """A checkpoint and its envelope from plain JSON. IntegrityError where it is none."""
    try:
        made, envelope = Checkpoint.model_validate(raw["checkpoint"]), raw["envelope"]
    except (KeyError, TypeError, ValidationError) as error:
        raise IntegrityError(f"{where} is not a checkpoint, or was changed") from error
    if not (envelope is None or isinstance(envelope, dict)) or set(raw) != {"checkpoint", "envelope"}:
        raise IntegrityError(f"{where} is not a checkpoint, or was changed")
    return made, envelope
