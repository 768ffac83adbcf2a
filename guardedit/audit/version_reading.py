"""Reading versions: nothing in this module writes. See `versions` for how they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guardedit.audit.base_files import check_base, spans_of
from guardedit.audit.files import TEMP_PREFIX
from guardedit.audit.lineage import (
    BASE,
    BaseRecord,
    Lineage,
    VersionRecord,
    check_edit_id,
    held_in,
    read_bytes,
    read_lineage,
)
from guardedit.audit.safetensors_bytes import read_span
from guardedit.errors import IntegrityError, NotFoundError, StaleError
from guardedit.records import digest_of_bytes, is_activation, parse_record


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


class VersionReader:
    """What is live, what is staged, and whether the bytes are those on record. Making one touches nothing."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._model = home / "model"

    @property
    def exists(self) -> bool:
        """Whether a base has been imported."""
        return (self._model / "CURRENT").exists()

    def lineage(self) -> Lineage:
        """Base and versions, every record checked (not the tensors' bytes: that is `verify`)."""
        if not (self._model / "base.json").exists() and not self.exists:
            raise NotFoundError(
                f"{self.home} guards no model yet; plan an edit first, or name another --home"
            )
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
        record = read_staged(folder)
        if record.edit_id != edit_id:
            raise IntegrityError(f"staged edit {edit_id} was moved: it says that it is {record.edit_id}")
        if record.parent_record != lineage.record or record.parent != lineage.version:
            raise StaleError(
                f"edit {edit_id} was staged on {record.parent}, live is {lineage.version}; plan again"
            )
        lineage.followed_by(record)
        self._check_bytes(record, folder)
        return StagedVersion(record, folder, self._overrides(lineage) | _posts(record, folder))

    def staged_ids(self) -> tuple[str, ...]:
        """Edits that are staged."""
        folder = self._model / "staged"
        if not folder.is_dir():
            return ()
        return tuple(sorted(p.name for p in folder.iterdir() if not p.name.startswith(TEMP_PREFIX)))

    def verify(self, *, base: bool = True) -> Verified:
        """Recompute every digest from bytes: records, pre- and post-images, and with `base` the base model's files."""
        lineage = self.lineage()
        total = check_base(lineage.base) if base else 0
        for record in lineage.versions:
            total += self._check_bytes(record, self._folder(record))
        return Verified(lineage.version, lineage.digest, len(lineage.versions), total)

    def _at(self, version: str | None) -> Lineage:
        lineage = self.lineage()
        return lineage if version is None else lineage.upto(version)

    def _folder(self, record: VersionRecord) -> Path:
        return self._model / "versions" / record.name

    def _overrides(self, lineage: Lineage) -> dict[str, Path]:
        held = {parameter: lineage.holder(parameter) for v in lineage.versions for parameter in v.parameters}
        return {
            parameter: self._model / "versions" / holder / "post" / f"{parameter}.bin"
            for parameter, holder in sorted(held.items())
            if holder != BASE
        }

    def _read(self, lineage: Lineage, parameter: str) -> RawTensor:
        digest = held_in(lineage.manifest, parameter)
        if digest is None:
            raise NotFoundError(f"the model has no parameter {parameter!r}")
        path = self._overrides(lineage).get(parameter)
        if is_activation(parameter):
            data = b"" if path is None else read_bytes(path)
            raw = RawTensor(parameter, "U8", (len(data),), data, digest)
        else:
            span = spans_of(lineage.base)[parameter]
            data = read_span(span) if path is None else read_bytes(path)
            raw = RawTensor(parameter, span.dtype, span.shape, data, digest)
        if digest_of_bytes(data) != digest:
            raise IntegrityError(f"the bytes of {parameter} ({path or 'base'}) are not those on record")
        return raw

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


def _posts(record: VersionRecord, folder: Path) -> dict[str, Path]:
    return {t.parameter: folder / "post" / f"{t.parameter}.bin" for t in record.tensors}


def read_staged(folder: Path) -> VersionRecord:
    """The record in a folder that is not live; its name is for the caller to check."""
    data, what = read_bytes(folder / "version.json"), f"{folder.name}/version.json"
    record = parse_record(VersionRecord, data, expected=None, what=what)
    record.check_seal(what)
    return record
