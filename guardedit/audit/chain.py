"""The chain of entries as bytes: how one is written, read and checked against its neighbours. No storage here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guardedit.errors import BadRequestError, IntegrityError
from guardedit.records import canonical, digest_of_bytes

GENESIS = "sha256:" + "0" * 64
"""What the first entry names as its predecessor."""
MAX_ENTRY = 64 * 2**20
"""Bytes of one entry: what thousands of requests and a whole drift report need, and what every reader can hold."""


@dataclass(frozen=True)
class Head:
    """The last entry's number and digest: all one needs to keep elsewhere."""

    seq: int
    digest: str


@dataclass(frozen=True)
class Entry:
    """One thing that happened. `seq` orders entries; `at` is information."""

    seq: int
    at: str
    """ISO 8601, UTC."""
    kind: str
    """What happened, e.g. "planned", "approved", "committed"."""
    body: dict[str, Any]
    prev: str
    digest: str


@dataclass(frozen=True)
class Seen:
    """A chain that was checked, and what its file was then (`index.identity`)."""

    chain: tuple[Entry, ...]
    file: list[int]

    def is_still(self, file: list[int] | None, head: Head | None) -> bool:
        """Whether neither file nor head was touched since."""
        last = self.chain[-1]
        return self.file == file and head == Head(last.seq, last.digest)


def encode_entry(seq: int, at: str, kind: str, body: dict[str, Any], prev: str) -> bytes:
    """The bytes that are hashed and stored. BadRequestError when the body holds what JSON cannot."""
    try:
        data = canonical({"format": 1, "seq": seq, "at": at, "kind": kind, "body": body, "prev": prev})
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRequestError(
            f"ledger entry {kind!r} holds a value that JSON cannot carry: {error}"
        ) from error
    if len(data) > MAX_ENTRY:
        raise BadRequestError(
            f"ledger entry {kind!r} has {len(data):,} bytes; at most {MAX_ENTRY:,} are allowed"
        )
    return data


def decode_row(row: tuple[Any, Any, Any], prev: str | None) -> Entry:
    """One row, checked against its digest, its number and (unless None) its predecessor's digest."""
    seq, data, digest = row
    if not (isinstance(seq, int) and isinstance(data, bytes) and isinstance(digest, str)):
        raise IntegrityError(f"ledger entry {seq!r} has the wrong type")
    if digest_of_bytes(data) != digest:
        raise IntegrityError(f"ledger entry {seq} was changed: its bytes do not hash to its digest")
    try:
        raw = json.loads(data)
        entry = Entry(raw["seq"], raw["at"], raw["kind"], raw["body"], raw["prev"], digest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"ledger entry {seq} cannot be read") from error
    if entry.seq != seq or not isinstance(entry.body, dict):
        raise IntegrityError(f"ledger entry {seq} was moved: it says that it is entry {entry.seq}")
    if prev is not None and entry.prev != prev:
        raise IntegrityError(
            f"ledger entry {seq} does not follow the entry before it: one was removed or changed"
        )
    return entry


def read_chain(rows: list[tuple[Any, Any, Any]]) -> Iterator[Entry]:
    """Rows to entries: numbered from 1 without a gap, each naming the one before."""
    prev = GENESIS
    for expected, row in enumerate(rows, start=1):
        if row[0] != expected:
            raise IntegrityError(f"ledger entry {expected} is missing; found {row[0]!r}")
        entry = decode_row(row, prev)
        yield entry
        prev = entry.digest


def require_head(chain: tuple[Entry, ...], head: Head, where: str) -> None:
    """IntegrityError unless the chain holds the entry that `head` names."""
    if not isinstance(head.seq, int) or not 1 <= head.seq <= len(chain):
        raise IntegrityError(f"the ledger ends at entry {len(chain)}, but {where} names entry {head.seq}")
    if chain[head.seq - 1].digest != head.digest:
        raise IntegrityError(f"ledger entry {head.seq} is not the one that {where} names")
