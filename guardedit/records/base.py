"""What every record is made of: frozen, closed, finite, with one byte string that its digest is taken of."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from guardedit.errors import IntegrityError

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Scope = Literal["target", "entailed", "subject", "near", "namesake", "far", "model"]
Stage = Literal["key", "delta", "rehearsal", "postop"]
Level = Literal["advisory", "soft", "hard"]
Verdict = Literal["pass", "fail", "inconclusive"]
Outcome = Literal[
    "auto-approved", "needs-approval", "blocked", "committed", "rolled-back", "held", "rejected",
    "stale", "expired", "superseded",
]  # fmt: skip

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Base of every record: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Grown(Record):
    """A record that got fields after there were some on record: those in `later` are left out where they are empty, so
    that records from before keep their bytes and digests."""

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_blank(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        return {name: value for name, value in found.items() if value or name not in self.later}


def canonical(value: Record | dict[str, Any] | list[Any]) -> bytes:
    """Canonical JSON: one byte string per value, whatever the insertion order."""
    plain = value.model_dump(mode="json") if isinstance(value, Record) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(value: Record | dict[str, Any] | list[Any]) -> str:
    """`sha256:…` of the canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical(value)).hexdigest()


def digest_of_bytes(data: bytes) -> str:
    """`sha256:…` of raw bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


ABSENT: str = digest_of_bytes(b"")
"""Digest of an activation edit that is not there."""


def is_activation(parameter: str) -> bool:
    """Whether a name in a manifest is that of an activation edit, "activation.<lowest layer>.<digits>"."""
    return parameter.startswith("activation.")


def parse_record(kind: type[R], data: bytes, *, expected: str | None, what: str) -> R:
    """Read a record from bytes whose digest is known.

    Raises IntegrityError when the bytes do not hash to `expected` or do not parse: both mean that
    somebody, or a disk, changed them.
    """
    if expected is not None and digest_of_bytes(data) != expected:
        raise IntegrityError(
            f"{what} was changed: its bytes hash to {digest_of_bytes(data)}, recorded is {expected}"
        )
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(f"{what} cannot be read: {first['loc']}: {first['msg']}") from error
