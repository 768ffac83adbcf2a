"""One editor at a time: a file lock, and a note saying who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from guardedit.audit.files import make_folder, storing, write_atomic
from guardedit.errors import LockedError
from guardedit.records import canonical


class HomeLock:
    """The lock of one home. Re-entrant within a thread; the operating system frees it when the process dies."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = FileLock(str(home / "lock"))
        self._owner = home / "lock.owner.json"

    @contextmanager
    def held(self, timeout_s: float = 0.0) -> Iterator[None]:
        """Hold the lock; LockedError names the owner when somebody else does."""
        make_folder(self._home)
        self._acquire(timeout_s)
        try:
            if self._lock.lock_counter == 1:
                write_atomic(self._owner, canonical(_who()))
            yield
        finally:
            if self._lock.lock_counter == 1:
                self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _acquire(self, timeout_s: float) -> None:
        # filelock's Timeout is an OSError: it has to be caught before `storing` sees it.
        with storing(self._home):
            try:
                self._lock.acquire(timeout=timeout_s)
            except Timeout as error:
                message = f"{self._home} is being edited by {self.owner()}; wait, or end that process"
                raise LockedError(message) from error

    def owner(self) -> str:
        """Who holds the lock, for a person; the note may be missing for an instant."""
        try:
            who = json.loads(self._owner.read_bytes())
            return f"process {who['pid']} on {who['host']} since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def _who() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
