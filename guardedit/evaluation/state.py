"""A long evaluation's memory: a JSON line a finished measurement, so that a run that was cut off goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from guardedit.errors import IntegrityError, StaleError
from guardedit.evaluation.metrics import CaseScores
from guardedit.records import Record, canonical, digest_of

Key = tuple[str, int]
"""A case, and the number of edits in the model when it was measured."""


class CaseResult(Record):
    """One case, measured before and after edits that are then taken back."""

    case_id: str
    before: dict[str, CaseScores]
    """By variant of the prompts ("raw", "chat", …)."""
    after: dict[str, CaseScores] | None
    """None where the edit could not be solved."""
    seconds: float
    """To solve the edit; in a joint solve, the case's share."""
    error: str | None = None
    diagnostics: dict[str, float | int | str | bool | None] = {}
    edits: int = 1
    """Cases edited in the model when `after` was measured."""
    checkpoint: bool = True
    """Every case edited so far was measured at this number of edits, too."""
    group: int = 0
    """Which batch or sequence."""
    seconds_measuring: float = 0.0
    """To measure both sides."""
    whole: dict[str, tuple[float, ...]] = {}
    """Figures of the edited model as a whole (far text, abilities), a value a text row or item; at a checkpoint's
    newest case only."""
    whole_base: dict[str, tuple[float, ...]] = {}
    """The same of the unedited model."""


class StateFile:
    """Append-only JSON lines under a header that says what the results belong to; created with the first result."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self._header = {"belongs_to": digest_of(header), **header}

    def load(self) -> dict[Key, CaseResult]:
        """Finished measurements; none where the file is not there yet.

        A last line that was cut off by a crash is dropped. Raises StaleError where the file belongs to another run,
        IntegrityError where an earlier line cannot be read.
        """
        if not self._path.is_file():
            return {}
        lines = self._whole_lines()
        if not lines:
            return {}
        self._check_header(lines[0])
        return {(result.case_id, result.edits): result for result in self._results(lines[1:])}

    def append(self, result: CaseResult) -> None:
        """Add one result; it is on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._path.is_file() or not self._path.stat().st_size
        with self._path.open("ab") as file:
            if fresh:
                file.write(canonical(self._header) + b"\n")
            file.write(canonical(result) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        """Lines that end in a line break; a cut-off rest is cut away from the file, too."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return whole.splitlines()

    def _check_header(self, line: bytes) -> None:
        try:
            found: Any = json.loads(line)
        except ValueError as error:
            raise IntegrityError(
                f"{self._path} line 1 cannot be read: {error}; start over with another file"
            ) from error
        if not isinstance(found, dict) or found.get("belongs_to") != self._header["belongs_to"]:
            found = found if isinstance(found, dict) else {}
            other = sorted(k for k in self._header if k != "belongs_to" and found.get(k) != self._header[k])
            raise StaleError(
                f"{self._path} holds results of another evaluation (it differs in {', '.join(other) or 'its digest'}); "
                "name another state file, or delete that one"
            )

    def _results(self, lines: list[bytes]) -> Iterator[CaseResult]:
        for number, line in enumerate(lines, start=2):
            try:
                yield CaseResult.model_validate_json(line)
            except ValidationError as error:
                raise IntegrityError(
                    f"{self._path} line {number} cannot be read; delete that line to measure its case again"
                ) from error
