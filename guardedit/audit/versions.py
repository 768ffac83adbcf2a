"""Versions of one model: what is live, what is staged, and the bytes that undo every edit.

    home/model/base.json                    the folder nobody writes, and its digests
    home/model/CURRENT                      the live version; switched by one atomic rename
    home/model/versions/<generation>-<id>/  version.json, post/<parameter>.bin, pre/<parameter>.bin
    home/model/staged/<id>/                 the same, not live yet

The live model is the base with the bytes of the changed tensors on top. An activation edit is kept like a tensor whose
bytes are none where it is not there; the base has none. Versions are never altered; undoing an edit
makes a new one from its pre-image bytes. Every method reads the disk: another process may have moved on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from guardedit.audit import files
from guardedit.audit.base_files import describe
from guardedit.audit.lineage import (
    BASE,
    BaseRecord,
    Lineage,
    Pointer,
    StoredTensor,
    VersionRecord,
    check_edit_id,
    check_parameter,
    read_base,
    read_bytes,
    replaced,
)
from guardedit.audit.locking import HomeLock
from guardedit.audit.recovery import Recovered, recover_folders
from guardedit.audit.version_reading import RawTensor, StagedVersion, Verified, VersionReader
from guardedit.errors import BadRequestError, IntegrityError, NotFoundError, OutOfOrderError, StaleError
from guardedit.records import canonical, digest_of, digest_of_bytes, is_activation

__all__ = ["RawTensor", "Recovered", "StagedVersion", "Verified", "VersionStore"]


class VersionStore(VersionReader):
    """The versions under one home. Making one touches nothing."""

    def __init__(self, home: Path, *, free: Callable[[Path], int] = files.free_bytes) -> None:
        super().__init__(home)
        self._free = free
        self._lock = HomeLock(home)

    @contextmanager
    def lock(self, timeout_s: float = 0.0) -> Iterator[None]:
        """Keep other editors out; LockedError names who holds it. Re-entrant."""
        with self._lock.held(timeout_s):
            yield

    def import_base(self, manifest: Mapping[str, str], folder: Path, name: str = "model") -> BaseRecord:
        """Record a folder as the model to guard, once all its bytes hash to `manifest`. Once is enough; again, the
        folder may have moved, and nothing is read when it has not (`verify` reads).

        StaleError when this home guards another model already.
        """
        if self.exists:
            known = self.base()
            if known.digest != digest_of(dict(manifest)):
                raise StaleError(f"{self.home} guards {known.name} already; use another --home for {name}")
            if known.folder == str(folder.absolute()):
                return known
        base = describe(name, folder, manifest)
        if self.exists and self.base().identity != base.identity:
            raise StaleError(f"{self.home} guards this model with other tokenizer or configuration files")
        with self.lock():
            files.make_folder(self._model)
            files.write_atomic(self._model / "base.json", canonical(base))
            if not self.exists:
                self._point(BASE, base.identity)
        return base

    def stage(
        self,
        edit_id: str,
        post_images: Mapping[str, bytes],
        *,
        expected: Mapping[str, str] | None = None,
        plan_digest: str | None = None,
    ) -> StagedVersion:
        """Write an edited version beside the live one; what is live is not touched.

        post_images: parameter -> raw little-endian bytes, dtype and shape of the base. expected: parameter -> digest,
        as planned; IntegrityError when one differs. StorageError unless twice the bytes touched are free.
        """
        with self.lock():
            lineage = self.lineage()
            if lineage.edit(check_edit_id(edit_id)) is not None:
                raise StaleError(f"edit {edit_id} was committed before; a new try is a new plan")
            before = self._before(lineage, post_images, expected)
            files.require_space(self._model, 2 * sum(map(len, post_images.values())), self._free)
            record = _record(lineage, "edit", edit_id, before, post_images, plan_digest)
            self.drop_staged(edit_id)
            self._write(record, self._model / "staged" / edit_id, post_images, before)
            return self.staged(edit_id)

    def commit(self, edit_id: str) -> VersionRecord:
        """Publish a staged version, complete with its pre-images, by one pointer switch."""
        with self.lock():
            staged = self.staged(edit_id)
            folder = self._folder(staged.record)
            files.make_folder(folder.parent)
            # The pointer's bytes are on disk before the folder moves: a full disk stops a commit while it is staged.
            pointer = self._prepare_pointer(staged.record.name, digest_of_bytes(canonical(staged.record)))
            files.move_folder(staged.folder, folder)
            files.publish_file(pointer, self._model / "CURRENT")
            return staged.record

    def drop_staged(self, edit_id: str) -> bool:
        """Delete a staged version; False when there was none."""
        with self.lock():
            folder = self._model / "staged" / check_edit_id(edit_id)
            found = folder.exists()
            files.remove_folder(folder)
            return found

    def roll_back(
        self, edit_id: str, before_switch: Callable[[VersionRecord], object] | None = None
    ) -> VersionRecord:
        """Undo a committed edit: a new version made of its pre-image bytes.

        `before_switch` is told of the complete version before it goes live; what it raises stops the undo.
        OutOfOrderError names the later edits on the same tensors that must go first. StaleError: undone already.
        """
        with self.lock():
            lineage = self.lineage()
            edit = lineage.edit(check_edit_id(edit_id))
            if edit is None:
                raise NotFoundError(f"edit {edit_id} was never committed")
            _refuse_undo(lineage, edit)
            self._check_bytes(edit, self._folder(edit))
            pre = {
                t.parameter: read_bytes(self._folder(edit) / "pre" / f"{t.parameter}.bin")
                for t in edit.tensors
            }
            files.require_space(self._model, 2 * sum(map(len, pre.values())), self._free)
            before = {parameter: self._read(lineage, parameter) for parameter in pre}
            record = _record(lineage, "roll-back", edit_id, before, pre, edit.plan_digest)
            files.remove_folder(self._folder(record))
            self._write(record, self._folder(record), pre, {})
            pointer = self._prepare_pointer(record.name, digest_of_bytes(canonical(record)))
            if before_switch is not None:
                before_switch(record)
            files.publish_file(pointer, self._model / "CURRENT")
            return record

    def recover(self, keep: frozenset[str] | None = None) -> Recovered:
        """Put right what a crash left; doing it twice changes nothing more.

        What CURRENT names is live, whatever else lies about. An edit whose commit had not reached the pointer is
        staged again. `keep`: staged edits that somebody still waits for; None keeps all.
        """
        with self.lock():
            if not (self._model / "base.json").exists() and not self.exists:
                files.remove_leftovers(self._model)
                return Recovered(BASE)
            self._finish_import()
            return recover_folders(self, keep)

    def _before(
        self, lineage: Lineage, post_images: Mapping[str, bytes], expected: Mapping[str, str] | None
    ) -> dict[str, RawTensor]:
        """The live tensors that an edit replaces, after the replacement was checked against them and the plan."""
        if not post_images:
            raise BadRequestError("an edit that changes no tensor cannot be staged")
        if expected is not None and set(expected) != set(post_images):
            raise IntegrityError(f"the plan changes {sorted(expected)}, the delta {sorted(post_images)}")
        before = {
            parameter: self._read(lineage, check_parameter(parameter)) for parameter in sorted(post_images)
        }
        for parameter, data in post_images.items():
            if not is_activation(parameter) and len(data) != len(before[parameter].data):
                need = len(before[parameter].data)
                raise BadRequestError(
                    f"{parameter} has {need} bytes as {before[parameter].dtype}, got {len(data)}"
                )
            if expected is not None and digest_of_bytes(data) != expected[parameter]:
                raise IntegrityError(f"{parameter} after the edit is not the tensor that was planned")
        return before

    def _write(
        self, record: VersionRecord, target: Path, post: Mapping[str, bytes], pre: Mapping[str, RawTensor]
    ) -> None:
        """All files under a temporary name, fsynced; then one rename."""
        files.make_folder(target.parent)
        temporary = files.make_temporary_folder(target.parent)
        try:
            for kind, images in (("pre", {p: t.data for p, t in pre.items()}), ("post", post)):
                if images:
                    files.make_folder(temporary / kind)
                for parameter, data in images.items():
                    files.write_new(temporary / kind / f"{parameter}.bin", data)
                    files.sync_folder(temporary / kind)
            files.write_new(temporary / "version.json", canonical(record))
            files.sync_folder(temporary)
            files.move_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _prepare_pointer(self, version: str, record: str) -> Path:
        return files.prepare_file(self._model / "CURRENT", canonical(Pointer(version=version, record=record)))

    def _point(self, version: str, record: str) -> None:
        files.publish_file(self._prepare_pointer(version, record), self._model / "CURRENT")

    def _finish_import(self) -> None:
        """A crash between base.json and CURRENT: nothing can have been edited yet."""
        versions = self._model / "versions"
        if self.exists:
            return
        if versions.is_dir() and any(versions.iterdir()):
            raise IntegrityError(f"{self._model / 'CURRENT'} is gone; which version is live cannot be told")
        self._point(BASE, read_base(self._model / "base.json").identity)


def _refuse_undo(lineage: Lineage, edit: VersionRecord) -> None:
    if lineage.undone(edit.edit_id):
        raise StaleError(f"edit {edit.edit_id} was rolled back before")
    later = lineage.standing_on(edit)
    if later:
        names = ", then ".join(v.edit_id for v in later)
        raise OutOfOrderError(
            f"edit {edit.edit_id} cannot be undone yet: later edits stand on it; undo {names} first"
        )


def _record(
    lineage: Lineage,
    action: str,
    edit_id: str,
    before: Mapping[str, RawTensor],
    after: Mapping[str, bytes],
    plan_digest: str | None,
) -> VersionRecord:
    tensors = tuple(
        StoredTensor(
            parameter=parameter,
            dtype=old.dtype,
            shape=(len(after[parameter]),) if is_activation(parameter) else old.shape,
            n_bytes=len(after[parameter]),
            digest_before=old.digest,
            digest_after=digest_of_bytes(after[parameter]),
        )
        for parameter, old in sorted(before.items())
    )
    manifest = replaced(lineage.manifest, tensors)
    return VersionRecord.model_validate(
        {
            "generation": lineage.generation + 1,
            "action": action,
            "edit_id": edit_id,
            "parent": lineage.version,
            "parent_record": lineage.record,
            "parent_digest": lineage.digest,
            "manifest": manifest,
            "digest": digest_of(manifest),
            "tensors": tensors,
            "plan_digest": plan_digest,
        }
    ).sealed()
