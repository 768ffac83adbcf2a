"""Reading an exported ledger: every line is checked before it is believed, and written only into an empty home."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.audit.chain import Entry, Head, read_chain
from guardedit.audit.checkpoints import Checkpoint, parse_checkpoint
from guardedit.audit.exporting import FORMAT, Row, named_files
from guardedit.audit.files import make_folder, write_atomic
from guardedit.audit.ledger import Ledger
from guardedit.errors import BadRequestError, IntegrityError, NotFoundError
from guardedit.records import canonical, digest_of_bytes

_ENTRY = re.compile(rb'\{"digest":"(sha256:[0-9a-f]{64})","entry":(\{.*\})\}', re.DOTALL)
_KEYS = {"format", "version", "entries", "head", "checkpoint", "blobs"}


@dataclass(frozen=True)
class Exported:
    """An exported ledger whose chain, head, checkpoint and files are those that it names."""

    rows: list[Row]
    entries: tuple[Entry, ...]
    checkpoint: tuple[Checkpoint, dict[str, Any] | None] | None
    files: dict[str, bytes]
    """Path in a home -> bytes; empty where it was exported without."""

    @property
    def head(self) -> Head:
        """The last entry."""
        return Head(self.entries[-1].seq, self.entries[-1].digest)


def is_export(path: Path) -> bool:
    """Whether a file begins as an exported ledger does."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(b'{"format":"guardedit-ledger"')
    except OSError:
        return False


def read_export(path: Path) -> Exported:
    """Everything in the file, checked. NotFoundError where it is not there; IntegrityError names the line or entry."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
    head = _head(lines[0], path.name)
    n, blobs = head["entries"], head["blobs"]
    if len(lines) != n + blobs + 2 or lines[-1]:
        raise IntegrityError(
            f"{path.name} names {n} entries and {blobs} files; it has {len(lines) - 2} lines of them"
        )
    rows = [_row(line, seq, path.name) for seq, line in enumerate(lines[1 : n + 1], start=1)]
    entries = tuple(read_chain(list(rows)))
    if entries[-1].digest != head["head"]:
        raise IntegrityError(f"{path.name}: its last entry is not the one that its first line names")
    checkpoint = _checkpoint(head["checkpoint"], entries, path.name)
    files = _files(lines[n + 1 : -1], entries, path.name)
    return Exported(rows, entries, checkpoint, files)


def _head(line: bytes, name: str) -> dict[str, Any]:
    try:
        head = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} is not an exported ledger: {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT or set(head) != _KEYS:
        raise IntegrityError(f"{name} is not an exported ledger")
    if head["version"] != 1:
        raise IntegrityError(f"{name} is of version {head['version']!r}; this guardedit reads version 1")
    counts = (head["entries"], head["blobs"])
    if not all(type(count) is int and count >= 0 for count in counts) or not head["entries"]:
        raise IntegrityError(f"{name}: its first line names {counts[0]!r} entries and {counts[1]!r} files")
    if json.dumps({key: head[key] for key in ("format", "version", "entries", "head", "checkpoint", "blobs")},
                  separators=(",", ":"), ensure_ascii=False).encode() != line:  # fmt: skip
        raise IntegrityError(f"{name}: its first line is not in the form that guardedit writes")
    return head


def _row(line: bytes, seq: int, name: str) -> Row:
    found = _ENTRY.fullmatch(line)
    if found is None:
        raise IntegrityError(f"{name}, line {seq + 1} is not a ledger entry")
    return seq, found[2], found[1].decode()


def _checkpoint(
    raw: Any, entries: tuple[Entry, ...], name: str
) -> tuple[Checkpoint, dict[str, Any] | None] | None:
    if raw is None:
        return None
    made, envelope = parse_checkpoint(raw, f"the checkpoint in {name}")
    if not made.seq <= len(entries) or entries[made.seq - 1].digest != made.digest:
        raise IntegrityError(f"{name}: its checkpoint names entry {made.seq}, which is another one here")
    return made, envelope


def _files(lines: list[bytes], entries: tuple[Entry, ...], name: str) -> dict[str, bytes]:
    """Files by path: exactly those that the ledger names, or none. A path is never taken from the file's word alone."""
    wanted, found = dict(named_files(entries)), {}
    for line in lines:
        try:
            raw = json.loads(line)
            data = base64.b64decode(raw["data"], validate=True)
            path, digest = str(raw["path"]), raw["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(f"{name} holds a line that is neither entry nor file: {error}") from error
        if canonical(raw) != line or path in found:
            raise IntegrityError(
                f"{name}: {path[:80]!r} is there twice, or not in the form that guardedit writes"
            )
        if wanted.get(path) != digest or digest_of_bytes(data) != digest:
            raise IntegrityError(f"{name}: {path[:80]!r} is not the file that the ledger names")
        found[path] = data
    if found and found.keys() != wanted.keys():
        raise IntegrityError(
            f"{name} lacks {sorted(wanted.keys() - found.keys())[0]}, which the ledger names"
        )
    return found


def require_empty(home: Path) -> None:
    """BadRequestError unless nothing of a record is in the home."""
    there = [
        n for n in ("ledger.sqlite", "ledger.head", "plans", "model", "checkpoints") if (home / n).exists()
    ]
    if there:
        raise BadRequestError(
            f"{home} has a record already ({', '.join(there)}); import into an empty --home"
        )


def write_import(home: Path, exported: Exported) -> None:
    """Put a checked export into an empty home; the ledger comes last. BadRequestError, StorageError."""
    require_empty(home)
    for name in exported.files:
        # What the ledger calls a plan is a folder's name below: the same rule as for every plan.
        if not re.fullmatch(r"plans/[a-z0-9][a-z0-9-]{0,63}/(plan\.json|delta\.safetensors)", name):
            raise IntegrityError(f"{name[:80]!r} is no place for a plan's file")
    for name, data in exported.files.items():
        make_folder((home / name).parent)
        write_atomic(home / name, data)
    if exported.checkpoint is not None:
        made, envelope = exported.checkpoint
        make_folder(home / "checkpoints")
        plain = {"checkpoint": made.model_dump(mode="json"), "envelope": envelope}
        write_atomic(home / "checkpoints" / f"{made.seq:06d}.json", canonical(plain) + b"\n")
    Ledger(home / "ledger.sqlite").adopt(exported.rows)
