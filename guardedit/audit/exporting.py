"""A ledger as one file of JSON lines, to hand on and to check without its home.

    {"format":"guardedit-ledger","version":1,"entries":N,"head":"sha256:…","checkpoint":…,"blobs":M}
    {"digest":"sha256:…","entry":{…}}                                N times, the entries' bytes as they are stored
    {"path":"plans/…","digest":"sha256:…","data":"<base64>"}         M times, only where they were asked for

Nothing in it says when or where it was written: equal ledgers give equal files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from guardedit.audit.chain import Entry
from guardedit.audit.files import make_folder, write_atomic
from guardedit.errors import IntegrityError, StorageError
from guardedit.records import canonical, digest_of_bytes

FORMAT = "guardedit-ledger"
Row = tuple[int, bytes, str]
"""Number, bytes and digest of an entry, as the ledger stores them."""


def write_export(
    path: Path, rows: list[Row], checkpoint: dict[str, Any] | None, blobs: Mapping[str, bytes]
) -> None:
    """Write the file. `blobs` are files of the home by their path in it. StorageError where that is not possible."""
    head = {
        "format": FORMAT, "version": 1, "entries": len(rows), "head": rows[-1][2], "checkpoint": checkpoint,
        "blobs": len(blobs),
    }  # fmt: skip
    lines = [json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()]
    lines += [entry_line(data, digest) for _, data, digest in rows]
    lines += [canonical({"path": name, "digest": digest_of_bytes(data), "data": base64.b64encode(data).decode()})
              for name, data in sorted(blobs.items())]  # fmt: skip
    make_folder(path.absolute().parent)
    write_atomic(path, b"\n".join(lines) + b"\n")


def entry_line(data: bytes, digest: str) -> bytes:
    """One entry's line: its stored bytes stand in it unchanged."""
    return b'{"digest":' + json.dumps(digest).encode() + b',"entry":' + data + b"}"


def named_files(entries: tuple[Entry, ...]) -> Iterator[tuple[str, str]]:
    """Path in the home and digest of every file that the ledger names: plans and their solved updates."""
    for entry in entries:
        if entry.kind != "planned":
            continue
        for name, key in (("plan.json", "plan_digest"), ("delta.safetensors", "delta_digest")):
            digest = entry.body.get(key)
            if isinstance(digest, str):
                yield f"plans/{entry.body.get('plan_id')}/{name}", digest


def read_files(home: Path, entries: tuple[Entry, ...]) -> dict[str, bytes]:
    """The bytes of those files. IntegrityError where one is gone or was changed."""
    found = {}
    for name, digest in named_files(entries):
        try:
            data = (home / name).read_bytes()
        except FileNotFoundError as error:
            raise IntegrityError(f"{name} is gone, the ledger names it") from error
        except OSError as error:
            raise StorageError(f"{name} cannot be read: {error.strerror}") from error
        if digest_of_bytes(data) != digest:
            raise IntegrityError(
                f"{name} was changed: it hashes to {digest_of_bytes(data)}, recorded is {digest}"
            )
        found[name] = data
    return found


def newest_checkpoint(home: Path) -> dict[str, Any] | None:
    """The last checkpoint in the home, as its file has it; None where there is none."""
    found = sorted((home / "checkpoints").glob("*.json"))
    if not found:
        return None
    try:
        raw = json.loads(found[-1].read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{found[-1].name} cannot be read: {error}") from error
    return raw if isinstance(raw, dict) else None
