"""Results of a long job as JSON lines under a header that says what they belong to: it can be taken up again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from guardedit.errors import IntegrityError, StaleError
from guardedit.records import canonical, digest_of


class RowFile:
    """Append-only; created with the first row. Without a path it remembers nothing."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path = path
        self._header = {"belongs_to": digest_of(header), **header}

    def load(self) -> list[dict[str, Any]]:
        """The rows that are there; a last line that a crash cut off is dropped.

        Raises StaleError where the file belongs to another job, IntegrityError where a line cannot be read.
        """
        if self._path is None or not self._path.is_file():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        rows = [self._parsed(number, line) for number, line in enumerate(whole.splitlines(), start=1)]
        if rows and rows[0].get("belongs_to") != self._header["belongs_to"]:
            differs = sorted(key for key in self._header if rows[0].get(key) != self._header[key])
            raise StaleError(
                f"{self._path} holds results of another job (it differs in "
                f"{', '.join(key for key in differs if key != 'belongs_to') or 'its digest'}); "
                "name another state file, or delete that one"
            )
        return rows[1:]

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; it is on disk when this returns."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._path.is_file() or not self._path.stat().st_size
        with self._path.open("ab") as file:
            if fresh:
                file.write(canonical(self._header) + b"\n")
            file.write(canonical(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise IntegrityError(
                f"{self._path} line {number} cannot be read: {error}; delete that line"
            ) from error
        if not isinstance(row, dict):
            raise IntegrityError(f"{self._path} line {number} is no object; delete that line")
        return row
