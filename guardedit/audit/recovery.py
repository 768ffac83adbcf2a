"""Putting right what a crash left. What CURRENT names is live, whatever else lies about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guardedit.audit import files
from guardedit.audit.lineage import Lineage, VersionRecord
from guardedit.audit.version_reading import VersionReader, read_staged
from guardedit.errors import BadRequestError, IntegrityError, StaleError


@dataclass(frozen=True)
class Recovered:
    """What `recover` did."""

    version: str
    """The live version: a crash never changes which one that is."""
    restaged: tuple[str, ...] = ()
    """Edits whose commit had not reached the pointer; they are staged again."""
    dropped: tuple[str, ...] = ()
    """Unfinished or unwanted folders that were deleted."""
    staged: tuple[str, ...] = ()
    """Complete staged edits that are still there."""


def recover_folders(reader: VersionReader, keep: frozenset[str] | None) -> Recovered:
    """Delete leftovers, put unpublished edits back among the staged, drop staged ones that are unusable or not in
    `keep` (None keeps all). Idempotent; the caller holds the lock and has seen to it that CURRENT is there."""
    model, lineage = reader.home / "model", reader.lineage()
    places = (reader.home, model, model / "staged", model / "versions")
    dropped = [name for place in places for name in files.remove_leftovers(place)]
    restaged, gone = _unpublish(reader, lineage, model)
    dropped += [*gone, *_drop_unwanted(reader, model, keep)]
    return Recovered(lineage.version, tuple(restaged), tuple(dropped), reader.staged_ids())


def _unpublish(reader: VersionReader, lineage: Lineage, model: Path) -> tuple[list[str], list[str]]:
    """Version folders that CURRENT does not lead to: edits go back to be staged, the rest is deleted."""
    folder, known = model / "versions", {v.name for v in lineage.versions}
    restaged: list[str] = []
    dropped: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in known:
            continue
        record = _staged_on(path, lineage)
        if record is not None and record.action == "edit" and record.edit_id not in reader.staged_ids():
            files.make_folder(model / "staged")
            files.move_folder(path, model / "staged" / record.edit_id)
            restaged.append(record.edit_id)
        else:
            files.remove_folder(path)
            dropped.append(path.name)
    return restaged, dropped


def _drop_unwanted(reader: VersionReader, model: Path, keep: frozenset[str] | None) -> list[str]:
    dropped = []
    for edit_id in reader.staged_ids():
        if (keep is not None and edit_id not in keep) or not _usable(reader, edit_id):
            files.remove_folder(model / "staged" / edit_id)
            dropped.append(edit_id)
    return dropped


def _usable(reader: VersionReader, edit_id: str) -> bool:
    try:
        reader.staged(edit_id)
    except (IntegrityError, StaleError, BadRequestError):
        return False
    return True


def _staged_on(folder: Path, lineage: Lineage) -> VersionRecord | None:
    """The record of a folder made on the live version; None when it cannot be read or was made on another."""
    try:
        record = read_staged(folder)
    except IntegrityError:
        return None
    return record if record.parent_record == lineage.record else None
