"""The ledger: an append-only, hash-chained list of what happened. The system of record; MLflow is a view of it.

Each row holds the canonical JSON of one entry, which names the digest of the entry before it, and the digest of those
bytes: every byte that a reader sees is hashed. `ledger.head`, beside the file, names the last entry, so that a lost
tail is seen too. Who can write both files can rewrite the whole story: keep a head (`Ledger.head`) elsewhere and hand
it to `verify` to rule that out.

Every reading checks the whole chain before it answers. A long chain that this process has checked is not checked again
while file and head are the very ones that were read (inode, size, times of change, last digest): an append by anybody
changes them. What was checked is then answered from memory, so nobody can change it in between.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from guardedit.audit.chain import (
    GENESIS,
    Entry,
    Head,
    Seen,
    decode_row,
    encode_entry,
    read_chain,
    require_head,
)
from guardedit.audit.files import make_folder, prepare_file, publish_file, storing
from guardedit.audit.index import extend_index, identity
from guardedit.errors import BadRequestError, IntegrityError, LockedError, StorageError
from guardedit.records import Record, canonical, digest_of_bytes

__all__ = ["Entry", "Head", "Ledger"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL, digest TEXT NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS only_next BEFORE INSERT ON entries
  WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM entries)
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE VIEW IF NOT EXISTS log AS
  SELECT seq, json_extract(CAST(entry AS TEXT), '$.at') AS at, json_extract(CAST(entry AS TEXT), '$.kind') AS kind,
         json_extract(CAST(entry AS TEXT), '$.body.edit_id') AS edit_id,
         json_extract(CAST(entry AS TEXT), '$.body.plan_id') AS plan_id
  FROM entries;
"""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_STORAGE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
}


_LONG = 500
"""Entries from which on a checked chain is kept; reading a shorter one costs little."""


class Ledger:
    """A ledger file that is created by the first `append`, not before."""

    def __init__(self, path: Path, *, timeout_s: float = 30.0, keep_from: int = _LONG) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._keep_from = keep_from
        self._seen: Seen | None = None

    @property
    def _head_path(self) -> Path:
        return self.path.with_suffix(".head")

    def append(self, kind: str, body: Record | dict[str, Any], at: datetime | None = None) -> Entry:
        """Write one entry durably; it is on disk when this returns.

        BadRequestError: `body` holds what JSON cannot. LockedError: another writer did not finish in time.
        StorageError: no space. IntegrityError: the chain's end is not what was recorded.
        """
        plain = body.model_dump(mode="json") if isinstance(body, Record) else body
        when = (at or datetime.now(UTC)).astimezone(UTC).isoformat()
        encode_entry(0, when, kind, plain, GENESIS)
        make_folder(self.path.parent)
        with self._alone():
            before = identity(self.path)
            entry = self._insert(when, kind, plain)
            extend_index(self.path, entry, before)
            self._follow(entry, before)
        return entry

    def _follow(self, entry: Entry, before: list[int] | None) -> None:
        """Keep what was checked, longer by our own entry, where it was whole just before; the lock is ours."""
        seen, after = self._seen, identity(self.path)
        if seen is None or after is None or not seen.is_still(before, Head(entry.seq - 1, entry.prev)):
            self._seen = None
        else:
            self._seen = Seen((*seen.chain, entry), after)

    def _insert(self, when: str, kind: str, plain: dict[str, Any]) -> Entry:
        with self._writing() as connection:
            last = self._last(connection)
            seq, prev = (last.seq + 1, last.digest) if last else (1, GENESIS)
            data = encode_entry(seq, when, kind, plain, prev)
            digest = digest_of_bytes(data)
            connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (seq, data, digest))
            # Space for the head is taken before the entry counts, so that a full disk cannot part the two.
            head = prepare_file(self._head_path, canonical({"digest": digest, "seq": seq}))
            connection.execute("COMMIT")
            publish_file(head, self._head_path)
        return decode_row((seq, data, digest), prev)

    def entries(
        self, kind: str | None = None, *, edit_id: str | None = None, plan_id: str | None = None
    ) -> tuple[Entry, ...]:
        """Entries in order, after the whole chain was checked; `edit_id` and `plan_id` look into the body."""
        wanted = {
            key: value for key, value in (("edit_id", edit_id), ("plan_id", plan_id)) if value is not None
        }
        return tuple(
            entry
            for entry in self._checked()
            if (kind is None or entry.kind == kind) and all(entry.body.get(k) == v for k, v in wanted.items())
        )

    def rows(self) -> list[tuple[int, bytes, str]]:
        """Number, bytes and digest of every entry as they are stored, after the whole chain was checked."""
        self._seen = None
        chain = self._checked()
        if not chain:
            return []
        with self._reading() as connection:
            found = connection.execute("SELECT seq, entry, digest FROM entries ORDER BY seq").fetchall()
        return found[: len(chain)]

    def adopt(self, rows: list[tuple[int, bytes, str]]) -> Head:
        """Take over the entries of another ledger, byte for byte, into one that has none yet.

        IntegrityError where they are no chain, BadRequestError where there are entries already.
        """
        last = list(read_chain(list(rows)))[-1]
        make_folder(self.path.parent)
        with self._alone(), self._writing() as connection:
            if self._last(connection) is not None:
                raise BadRequestError(f"ledger {self.path} has entries already")
            connection.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
            head = prepare_file(self._head_path, canonical({"digest": last.digest, "seq": last.seq}))
            connection.execute("COMMIT")
            publish_file(head, self._head_path)
        return Head(last.seq, last.digest)

    def head(self) -> Head | None:
        """Number and digest of the last entry; None while nothing has been written."""
        chain = self._checked()
        return Head(chain[-1].seq, chain[-1].digest) if chain else None

    def verify(self, anchor: Head | None = None) -> Head | None:
        """Check the chain, the file's structure and, with `anchor`, that the chain still holds a head kept elsewhere.

        Returns the head. IntegrityError names the entry at which the chain breaks.
        """
        self._seen = None
        chain = self._checked()
        if self.path.exists():
            with self._reading() as connection:
                _check_structure(connection)
        if anchor is not None:
            require_head(chain, anchor, "the head that was kept elsewhere")
        return Head(chain[-1].seq, chain[-1].digest) if chain else None

    def _checked(self) -> tuple[Entry, ...]:
        # The head is read first: an append in between makes the chain longer than the head, never shorter.
        head = self._stored_head()
        if not self.path.exists():
            if head is not None:
                raise IntegrityError(f"ledger {self.path} is gone; its head names entry {head.seq}")
            return ()
        file = identity(self.path)
        if self._seen is not None and self._seen.is_still(file, head):
            return self._seen.chain
        with self._reading() as connection:
            rows = connection.execute("SELECT seq, entry, digest FROM entries ORDER BY seq").fetchall()
        chain = tuple(read_chain(rows))
        if head is not None:
            require_head(chain, head, self._head_path.name)
        elif len(chain) > 1:
            raise IntegrityError(f"{self._head_path} is gone; it names the last entry of the ledger")
        self._seen = Seen(chain, file) if file is not None and len(chain) >= self._keep_from else None
        return chain

    def _stored_head(self) -> Head | None:
        try:
            data = self._head_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self._head_path} cannot be read: {error.strerror}") from error
        try:
            raw = json.loads(data)
            head = Head(raw["seq"], raw["digest"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(f"{self._head_path} cannot be read: it was changed") from error
        if canonical({"digest": head.digest, "seq": head.seq}) != data:
            raise IntegrityError(f"{self._head_path} was changed")
        return head

    def _last(self, connection: sqlite3.Connection) -> Entry | None:
        """The entry that the next one builds on, checked by itself and against the head."""
        row = connection.execute(
            "SELECT seq, entry, digest FROM entries ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        head = self._stored_head()
        if head is not None:
            named = connection.execute("SELECT digest FROM entries WHERE seq = ?", (head.seq,)).fetchone()
            if named != (head.digest,):
                raise IntegrityError(
                    f"the ledger does not hold entry {head.seq}, which {self._head_path.name} names"
                )
        return None if row is None else decode_row(row, None)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time: SQLite alone cannot order the first writers of a new file."""
        lock = FileLock(str(self.path) + ".lock", timeout=self._timeout_s)
        # filelock's Timeout is an OSError: it has to be caught before `storing` sees it.
        with storing(self.path):
            try:
                lock.acquire()
            except Timeout as error:
                raise LockedError(f"ledger {self.path} is being written by another process") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        if self._stored_head() is not None and not self.path.exists():
            raise IntegrityError(f"ledger {self.path} is gone, but {self._head_path.name} is there")
        with _explained(self.path, reading=False):
            connection = sqlite3.connect(self.path, timeout=self._timeout_s, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("PRAGMA trusted_schema=OFF")
                connection.executescript(_SCHEMA)
                connection.execute("BEGIN IMMEDIATE")
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path, reading=True):
            # A copy on a read-only disk cannot have the shared memory that WAL wants; nobody writes there either.
            writable = os.access(self.path.parent, os.W_OK) and os.access(self.path, os.W_OK)
            mode = "mode=rw" if writable else "mode=ro&immutable=1"
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?{mode}", uri=True, timeout=self._timeout_s
            )
            try:
                connection.execute("PRAGMA query_only=ON")
                connection.execute("PRAGMA trusted_schema=OFF")
                yield connection
            finally:
                connection.close()


def _check_structure(connection: sqlite3.Connection) -> None:
    answer = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
    if answer != ["ok"]:
        raise IntegrityError(f"the ledger's file is damaged: {answer[0] if answer else 'no answer'}")


@contextmanager
def _explained(path: Path, *, reading: bool) -> Iterator[None]:
    """SQLite's errors as ours. What cannot be read although the file is there was changed by somebody, or a disk."""
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeDecodeError, MemoryError) as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code in _BUSY:
            raise LockedError(f"ledger {path} is being written by another process") from error
        if code in _STORAGE and not (reading and os.access(path, os.R_OK)):
            raise StorageError(f"ledger {path} cannot be written: {error}") from error
        raise IntegrityError(f"ledger {path} is damaged: {error}") from error
