"""The ledger's index: what `status` and `log` show of each entry, so that they need not hash half a gigabyte each time.

It is derived, and says nothing of its own: it counts only while the ledger's file is the very one that was checked when
the index was written (inode, size, times of change; a ledger that was touched since is checked whole again), its last
entry is the one that `ledger.head` names, and its lines hash to its mark. Who decides anything (apply, approve, verify,
audit) reads the ledger, never this. Standard library only: importing this is quick.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

FORMAT = 1
_Identity = list[int]


class Slip(NamedTuple):
    """What is shown of one entry."""

    seq: int
    at: str
    kind: str
    digest: str
    plan_id: str | None
    edit_id: str | None
    event: str | None
    more: dict[str, Any]
    """Of a plan its editor, digest and what it is about; of an emergency and its review what is due."""


class Entered(Protocol):
    """What is needed of a ledger entry."""

    @property
    def seq(self) -> int:
        """Its number."""

    @property
    def at(self) -> str:
        """When it was written."""

    @property
    def kind(self) -> str:
        """What happened."""

    @property
    def body(self) -> dict[str, Any]:
        """The particulars."""

    @property
    def digest(self) -> str:
        """Digest of its bytes."""


def slip_of(entry: Entered) -> Slip:
    """The slip of one entry."""
    body = entry.body
    names = (body.get("plan_id"), body.get("edit_id"), body.get("event"))
    return Slip(entry.seq, entry.at, entry.kind, entry.digest, *names, _more(entry.kind, body))


def _more(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    if kind == "planned":
        about = about_of(body.get("requests", []), body.get("stopped", []))
        return {"editor": body.get("editor"), "plan_digest": body.get("plan_digest"), "edit": about}
    word = body.get("decision") or {}
    if kind == "decided" and word.get("ticket"):
        return {"ticket": word["ticket"], "by": word["approver"], "due": word["review_due"]}
    return {"of": body["of"]} if kind == "reviewed" else {}


def about_of(requests: Sequence[dict[str, Any]], stopped: Sequence[dict[str, Any]]) -> str:
    """What a plan is about, on one line."""
    if len(requests) == 1 and not stopped:
        one = requests[0]
        return f"{one['subject']}: {one['target_true']} -> {one['target_new']}"
    first = [one["subject"] for one in requests[:3]]
    more = ", …" if len(requests) > len(first) else ""
    left_out = f"; {len(stopped)} stopped" if stopped else ""
    return f"{len(requests)} facts{': ' if first else ''}{', '.join(first)}{more}{left_out}"


def identity(ledger: Path) -> _Identity | None:
    """What tells whether the ledger's file was touched; None without a file, or with a journal not written back."""
    try:
        wal = ledger.with_name(ledger.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            return None
        found = ledger.stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def read_index(ledger: Path) -> tuple[Slip, ...] | None:
    """The slips of a ledger that is as it was when it was checked; None where that cannot be said."""
    try:
        lines = _path(ledger).read_bytes().split(b"\n")
        mark = json.loads(lines[-1])
        head = json.loads(ledger.with_suffix(".head").read_bytes())
        if mark["format"] != FORMAT or mark["ledger"] != identity(ledger):
            return None
        if _summed(lines[:-1]) != mark["sum"] or head["digest"] != mark["head"]:
            return None
        slips = tuple(Slip(*raw) for raw in json.loads(b"[" + b",".join(lines[:-1]) + b"]"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = slips and slips[-1].seq == len(slips) == head["seq"] and slips[-1].digest == head["digest"]
    return slips if fits else None


def write_index(ledger: Path, entries: Iterable[Entered], checked: _Identity | None) -> tuple[Slip, ...]:
    """The slips of a chain that was just checked, kept where `checked`, the identity from before, still holds.

    A home that cannot be written is read all the same.
    """
    slips = tuple(slip_of(entry) for entry in entries)
    if slips and checked is not None and checked == identity(ledger):
        lines = [_line(slip) for slip in slips]
        data = b"\n".join([*lines, _mark(slips[-1], _summed(lines), checked)])
        path = _path(ledger)
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            temporary.write_bytes(data)
            temporary.replace(path)
    return slips


def extend_index(ledger: Path, entry: Entered, before: _Identity | None) -> None:
    """Follow one append, by whoever holds the ledger's lock: `before` is the identity just before it."""
    path, after = _path(ledger), identity(ledger)
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 4096)
            file.seek(start)
            tail = file.read()
            at = tail.rindex(b"\n") + 1
            mark = json.loads(tail[at:])
            if before is None or mark["ledger"] != before or after is None:
                return
            line = _line(slip_of(entry))
            file.seek(start + at)
            file.truncate()
            file.write(line + b"\n" + _mark(slip_of(entry), _sum(mark["sum"], line), after))
    except (OSError, ValueError, KeyError, TypeError):
        return


def _path(ledger: Path) -> Path:
    return ledger.with_suffix(".index")


def _line(slip: Slip) -> bytes:
    return json.dumps(slip, separators=(",", ":"), ensure_ascii=True).encode()


def _mark(last: Slip, summed: str, found: _Identity) -> bytes:
    return json.dumps({"format": FORMAT, "head": last.digest, "ledger": found, "sum": summed}).encode()


def _summed(lines: Iterable[bytes]) -> str:
    found = ""
    for line in lines:
        found = _sum(found, line)
    return found


def _sum(before: str, line: bytes) -> str:
    return hashlib.sha256(before.encode() + line).hexdigest()
