"""Solved edits of a long sequence, kept beside its state file: a run that was cut off does not solve them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from guardedit.audit.files import write_atomic
from guardedit.edits.deltas import EditDelta, decode, encode
from guardedit.evaluation.methods import Edit
from guardedit.records import DeltaRecord, Record, canonical, digest_of_bytes, parse_record

_NO_MODEL = "sha256:" + "0" * 64


class SolvedStep(Record):
    """How one solve went; its tensors lie in a file beside."""

    belongs_to: str
    """Digest of the state file's header, and which solve of the run."""
    seconds: float
    error: str | None = None
    delta: DeltaRecord | None = None


@dataclass(frozen=True)
class Solved:
    """One solve's outcome."""

    edit: EditDelta | Edit | None
    """None where it could not be solved."""
    seconds: float
    error: str | None = None

    @property
    def diagnostics(self) -> Mapping[str, float | int | str | bool | None]:
        """The editor's own report."""
        return self.edit.diagnostics if self.edit is not None else {}


@dataclass(frozen=True)
class DeltaShelf:
    """A folder of solved deltas that belong to one run."""

    folder: Path
    belongs_to: str

    def get(self, name: str) -> Solved | None:
        """The outcome that was put under the name, or None. Raises IntegrityError for bytes that were changed."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        step = parse_record(SolvedStep, path.read_bytes(), expected=None, what=str(path))
        if step.belongs_to != self._mark(name):
            return None
        if step.delta is None:
            return Solved(None, step.seconds, step.error)
        data = (self.folder / f"{name}.safetensors").read_bytes()
        return Solved(decode(data, step.delta), step.seconds)

    def put(self, name: str, solved: Solved) -> None:
        """Keep an outcome; edits that are no change of weights are solved again instead."""
        if solved.edit is not None and not isinstance(solved.edit, EditDelta):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        record = None
        if solved.edit is not None:
            data = encode(solved.edit)
            record = DeltaRecord(
                editor=solved.edit.editor,
                changes=(),
                file_digest=digest_of_bytes(data),
                hparams=solved.edit.hparams,
                model_digest=_NO_MODEL,
                diagnostics=solved.edit.diagnostics,
            )
            # Tensors first: a description without its tensors would be taken for a damaged one.
            write_atomic(self.folder / f"{name}.safetensors", data)
        step = SolvedStep(
            belongs_to=self._mark(name), seconds=solved.seconds, error=solved.error, delta=record
        )
        write_atomic(self.folder / f"{name}.json", canonical(step))

    def _mark(self, name: str) -> str:
        return f"{self.belongs_to} {name}"
