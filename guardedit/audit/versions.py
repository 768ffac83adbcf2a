"""Versions of one model: what is live, what is staged, and the bytes that undo every edit.

    home/model/base.json                    the folder nobody writes, and its digests
    home/model/CURRENT                      the live version; switched by one atomic rename
    home/model/versions/<generation>-<id>/  version.json, post/<parameter>.bin, pre/<parameter>.bin
    home/model/staged/<id>/                 the same, not live yet

The live model is the base with the bytes of the changed tensors on top. Versions are never altered; undoing an edit makes
a new one from its pre-image bytes. Every method reads the disk: another process may have moved on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from guardedit.audit import files
from guardedit.audit.base_files import check_base, describe, spans_of
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
    read_lineage,
)
from guardedit.audit.locking import HomeLock
from guardedit.audit.safetensors_bytes import read_span
from guardedit.errors import BadRequestError, IntegrityError, NotFoundError, OutOfOrderError, StaleError
from guardedit.records import canonical, digest_of, digest_of_bytes, parse_record


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes, checked against its digest."""

    parameter: str
    dtype: str
    """safetensors' word, e.g. "F32"."""
    shape: tuple[int, ...]
    """As in the model's state, not turned to (d_out, d_in)."""
    data: bytes
    """Little-endian."""
    digest: str


@dataclass(frozen=True)
class StagedVersion:
    """A complete version that nobody loads by itself."""

    record: VersionRecord
    folder: Path
    overrides: dict[str, Path]
    """Parameter -> raw bytes, of everything that differs from the base: the live changes and the staged ones."""

    @property
    def digest(self) -> str:
        """Digest that the model will have once this is committed."""
        return self.record.digest


@dataclass(frozen=True)
class Verified:
    """What `verify` found in order."""

    version: str
    digest: str
    n_versions: int
    n_bytes: int
    """Bytes hashed."""


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


class VersionStore:
    """The versions under one home. Making one touches nothing."""

    def __init__(self, home: Path, *, free: Callable[[Path], int] = files.free_bytes) -> None:
        self.home = home
        self._model = home / "model"
        self._free = free
        self._lock = HomeLock(home)

    # -- reading

    @property
    def exists(self) -> bool:
        """Whether a base has been imported."""
        return (self._model / "CURRENT").exists()

    def lineage(self) -> Lineage:
        """Base and versions, every record checked (not the tensors' bytes: that is `verify`)."""
        if not (self._model / "base.json").exists() and not self.exists:
            raise NotFoundError(f"{self.home} guards no model yet; plan an edit first, or name another --home")
        return read_lineage(self._model)

    def base(self) -> BaseRecord:
        """The lineage's first version."""
        return self.lineage().base

    def manifest(self, version: str | None = None) -> dict[str, str]:
        """Parameter -> digest; of the live version, or of a named one ("base", a version's name, an edit's id)."""
        return self._at(version).manifest

    def digest(self, version: str | None = None) -> str:
        """Digest of the manifest: equal to the loaded model's own digest."""
        return self._at(version).digest

    def live_overrides(self, version: str | None = None) -> dict[str, Path]:
        """Parameter -> file of raw bytes, for every parameter that differs from the base. Read them with `read`."""
        return self._overrides(self._at(version))

    def read(self, parameter: str, version: str | None = None) -> RawTensor:
        """The bytes of one parameter in a version. IntegrityError unless they hash to the manifest."""
        return self._read(self._at(version), parameter)

    def staged(self, edit_id: str) -> StagedVersion:
        """A staged edit; its bytes are checked. StaleError when the live model has moved on since."""
        lineage = self.lineage()
        folder = self._model / "staged" / check_edit_id(edit_id)
        if not folder.is_dir():
            raise NotFoundError(f"edit {edit_id} is not staged")
        record = _read_staged(folder)
        if record.edit_id != edit_id:
            raise IntegrityError(f"staged edit {edit_id} was moved: it says that it is {record.edit_id}")
        if record.parent_record != lineage.record or record.parent != lineage.version:
            raise StaleError(f"edit {edit_id} was staged on {record.parent}, live is {lineage.version}; plan again")
        self._check_bytes(record, folder)
        return StagedVersion(record, folder, self._overrides(lineage) | _posts(record, folder))

    def staged_ids(self) -> tuple[str, ...]:
        """Edits that are staged."""
        folder = self._model / "staged"
        if not folder.is_dir():
            return ()
        return tuple(sorted(p.name for p in folder.iterdir() if not p.name.startswith(files.TEMP_PREFIX)))

    def verify(self, *, base: bool = True) -> Verified:
        """Recompute every digest from bytes: records, pre- and post-images, and with `base` the base model's files."""
        lineage = self.lineage()
        total = check_base(lineage.base) if base else 0
        for record in lineage.versions:
            total += self._check_bytes(record, self._folder(record))
        return Verified(lineage.version, lineage.digest, len(lineage.versions), total)

    # -- writing

    @contextmanager
    def lock(self, timeout_s: float = 0.0) -> Iterator[None]:
        """Keep other editors out; LockedError names who holds it. Re-entrant."""
        with self._lock.held(timeout_s):
            yield

    def import_base(self, manifest: Mapping[str, str], folder: Path, name: str = "model") -> BaseRecord:
        """Record a folder as the model to guard, once all its bytes hash to `manifest`. Again: the folder may move.

        StaleError when this home guards another model already.
        """
        if self.exists and self.base().digest != digest_of(dict(manifest)):
            raise StaleError(f"{self.home} guards {self.base().name} already; use another --home for {name}")
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
            files.move_folder(staged.folder, folder)
            self._point(staged.record.name, digest_of_bytes(canonical(staged.record)))
            return staged.record

    def drop_staged(self, edit_id: str) -> bool:
        """Delete a staged version; False when there was none."""
        with self.lock():
            folder = self._model / "staged" / check_edit_id(edit_id)
            found = folder.exists()
            files.remove_folder(folder)
            return found

    def roll_back(self, edit_id: str) -> VersionRecord:
        """Undo a committed edit: a new version made of its pre-image bytes.

        OutOfOrderError names the later edits on the same tensors that must go first. StaleError: undone already.
        """
        with self.lock():
            lineage = self.lineage()
            edit = lineage.edit(check_edit_id(edit_id))
            if edit is None:
                raise NotFoundError(f"edit {edit_id} was never committed")
            _refuse_undo(lineage, edit)
            self._check_bytes(edit, self._folder(edit))
            pre = {t.parameter: read_bytes(self._folder(edit) / "pre" / f"{t.parameter}.bin") for t in edit.tensors}
            files.require_space(self._model, 2 * sum(map(len, pre.values())), self._free)
            before = {parameter: self._read(lineage, parameter) for parameter in pre}
            record = _record(lineage, "roll-back", edit_id, before, pre, edit.plan_digest)
            files.remove_folder(self._folder(record))
            self._write(record, self._folder(record), pre, {})
            self._point(record.name, digest_of_bytes(canonical(record)))
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
            lineage = self.lineage()
            dropped = [name for place in self._places() for name in files.remove_leftovers(place)]
            restaged = self._unpublish(lineage, dropped)
            dropped += self._drop_unwanted(keep)
            return Recovered(lineage.version, tuple(restaged), tuple(dropped), self.staged_ids())

    # -- helpers

    def _at(self, version: str | None) -> Lineage:
        lineage = self.lineage()
        return lineage if version is None else lineage.upto(version)

    def _folder(self, record: VersionRecord) -> Path:
        return self._model / "versions" / record.name

    def _places(self) -> tuple[Path, ...]:
        return (self.home, self._model, self._model / "staged", self._model / "versions")

    def _overrides(self, lineage: Lineage) -> dict[str, Path]:
        held = {parameter: lineage.holder(parameter) for v in lineage.versions for parameter in v.parameters}
        return {
            parameter: self._model / "versions" / holder / "post" / f"{parameter}.bin"
            for parameter, holder in sorted(held.items())
            if holder != BASE
        }

    def _read(self, lineage: Lineage, parameter: str) -> RawTensor:
        digest = lineage.manifest.get(parameter)
        if digest is None:
            raise NotFoundError(f"the model has no parameter {parameter!r}")
        span = spans_of(lineage.base)[parameter]
        path = self._overrides(lineage).get(parameter)
        data = read_span(span) if path is None else read_bytes(path)
        if digest_of_bytes(data) != digest:
            raise IntegrityError(f"the bytes of {parameter} ({path or span.file.name}) are not those on record")
        return RawTensor(parameter, span.dtype, span.shape, data, digest)

    def _before(
        self, lineage: Lineage, post_images: Mapping[str, bytes], expected: Mapping[str, str] | None
    ) -> dict[str, RawTensor]:
        """The live tensors that an edit replaces, after the replacement was checked against them and the plan."""
        if not post_images:
            raise BadRequestError("an edit that changes no tensor cannot be staged")
        if expected is not None and set(expected) != set(post_images):
            raise IntegrityError(f"the plan changes {sorted(expected)}, the delta {sorted(post_images)}")
        before = {parameter: self._read(lineage, check_parameter(parameter)) for parameter in sorted(post_images)}
        for parameter, data in post_images.items():
            if len(data) != len(before[parameter].data):
                need = len(before[parameter].data)
                raise BadRequestError(f"{parameter} has {need} bytes as {before[parameter].dtype}, got {len(data)}")
            if expected is not None and digest_of_bytes(data) != expected[parameter]:
                raise IntegrityError(f"{parameter} after the edit is not the tensor that was planned")
        return before

    def _write(
        self, record: VersionRecord, target: Path, post: Mapping[str, bytes], pre: Mapping[str, RawTensor]
    ) -> None:
        """All files under a temporary name, fsynced; then one rename."""
        files.make_folder(target.parent)
        with files.storing(target):
            temporary = Path(tempfile.mkdtemp(prefix=files.TEMP_PREFIX, dir=target.parent))
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
            files.remove_leftovers(target.parent)
            raise

    def _check_bytes(self, record: VersionRecord, folder: Path) -> int:
        total = 0
        for tensor in record.tensors:
            kinds = {"post": tensor.digest_after}
            if record.action == "edit":
                kinds["pre"] = tensor.digest_before
            for kind, digest in kinds.items():
                data = read_bytes(folder / kind / f"{tensor.parameter}.bin")
                if digest_of_bytes(data) != digest:
                    raise IntegrityError(f"version {record.name}: {kind}/{tensor.parameter}.bin was changed")
                total += len(data)
        return total

    def _point(self, version: str, record: str) -> None:
        files.write_atomic(self._model / "CURRENT", canonical(Pointer(version=version, record=record)))

    def _finish_import(self) -> None:
        """A crash between base.json and CURRENT: nothing can have been edited yet."""
        versions = self._model / "versions"
        if self.exists:
            return
        if versions.is_dir() and any(versions.iterdir()):
            raise IntegrityError(f"{self._model / 'CURRENT'} is gone; which version is live cannot be told")
        self._point(BASE, read_base(self._model / "base.json").identity)

    def _unpublish(self, lineage: Lineage, dropped: list[str]) -> list[str]:
        """Version folders that CURRENT does not lead to: edits go back to be staged, the rest is deleted."""
        folder, known = self._model / "versions", {v.name for v in lineage.versions}
        restaged: list[str] = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name in known:
                continue
            record = _staged_on(path, lineage)
            if record is not None and record.action == "edit" and record.edit_id not in self.staged_ids():
                files.make_folder(self._model / "staged")
                files.move_folder(path, self._model / "staged" / record.edit_id)
                restaged.append(record.edit_id)
            else:
                files.remove_folder(path)
                dropped.append(path.name)
        return restaged

    def _drop_unwanted(self, keep: frozenset[str] | None) -> list[str]:
        dropped = []
        for edit_id in self.staged_ids():
            try:
                wanted = keep is None or edit_id in keep
                if wanted:
                    self.staged(edit_id)
            except (IntegrityError, StaleError, BadRequestError):
                wanted = False
            if not wanted:
                files.remove_folder(self._model / "staged" / edit_id)
                dropped.append(edit_id)
        return dropped


def _posts(record: VersionRecord, folder: Path) -> dict[str, Path]:
    return {t.parameter: folder / "post" / f"{t.parameter}.bin" for t in record.tensors}


def _read_staged(folder: Path) -> VersionRecord:
    data = read_bytes(folder / "version.json")
    return parse_record(VersionRecord, data, expected=None, what=f"{folder.name}/version.json")


def _staged_on(folder: Path, lineage: Lineage) -> VersionRecord | None:
    """The record of a folder made on the live version; None when it cannot be read or was made on another."""
    try:
        record = _read_staged(folder)
    except IntegrityError:
        return None
    return record if record.parent_record == lineage.record else None


def _refuse_undo(lineage: Lineage, edit: VersionRecord) -> None:
    if lineage.undone(edit.edit_id):
        raise StaleError(f"edit {edit.edit_id} was rolled back before")
    later = lineage.standing_on(edit)
    if later:
        names = ", then ".join(v.edit_id for v in later)
        raise OutOfOrderError(f"edit {edit.edit_id} cannot be undone yet: later edits stand on it; undo {names} first")


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
            shape=old.shape,
            n_bytes=len(old.data),
            digest_before=old.digest,
            digest_after=digest_of_bytes(after[parameter]),
        )
        for parameter, old in sorted(before.items())
    )
    manifest = lineage.manifest | {t.parameter: t.digest_after for t in tensors}
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
    )
