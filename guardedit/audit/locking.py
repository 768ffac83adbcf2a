"""One editor at a time: a file lock, and a note saying who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from guardedit.audit.files import make_folder, storing, write_atomic
from guardedit.errors import LockedError, StorageError
from guardedit.records import canonical


class HomeLock:
    """The lock of one home. Re-entrant within a thread; the operating system frees it when the process dies."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._owner = home / "lock.owner.json"
        self._lock: FileLock | None = None
        self._pid = 0

    @contextmanager
    def held(self, timeout_s: float = 0.0) -> Iterator[None]:
        """Hold the lock; LockedError names the owner when somebody else does."""
        make_folder(self._home)
        lock = self._acquired(timeout_s)
        try:
            if lock.lock_counter == 1:
                # The note is a courtesy: a full disk must not keep anybody from making room.
                with suppress(StorageError):
                    write_atomic(self._owner, canonical(_who()))
            yield
        finally:
            if lock.lock_counter == 1:
                with suppress(OSError):
                    self._owner.unlink(missing_ok=True)
            lock.release()

    def _acquired(self, timeout_s: float) -> FileLock:
        # A forked process shares its parent's file description, and with it the parent's lock: it needs its own.
        if self._lock is None or self._pid != os.getpid():
            self._lock, self._pid = FileLock(str(self._home / "lock")), os.getpid()
        # filelock's Timeout is an OSError: it has to be caught before `storing` sees it.
        with storing(self._home):
            try:
                self._lock.acquire(timeout=timeout_s)
            except Timeout as error:
                message = f"{self._home} is being edited by {self.owner()}; wait, or end that process"
                raise LockedError(message) from error
        return self._lock

    def owner(self) -> str:
        """Who holds the lock, for a person; the note may be missing for an instant."""
        try:
            who = json.loads(self._owner.read_bytes())
            return f"process {who['pid']} on {who['host']} since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def _who() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
