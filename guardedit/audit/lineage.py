"""What is written about versions: the base, each version's record, the pointer, and the chain they form.

CURRENT names the live version and the digest of its record; each record names its parent and the digest of the parent's
record, down to base.json. A changed byte in any of them breaks the chain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from guardedit.errors import BadRequestError, IntegrityError, NotFoundError
from guardedit.records import (
    ABSENT,
    Digest,
    Record,
    canonical,
    digest_of,
    digest_of_bytes,
    is_activation,
    parse_record,
)

BASE = "base"
"""Name of the version that nobody has edited."""
_EDIT_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PARAMETER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_VERSION = re.compile(r"base|\d{6}-[a-z0-9][a-z0-9._-]{0,79}")


class Sealed(Record):
    """A record that says what it hashes to, for the time before another record says so."""

    seal: str = ""
    """Digest of the record without its seal."""

    def sealed(self) -> Self:
        """The same with a fresh seal."""
        return self.model_copy(update={"seal": digest_of(self.model_copy(update={"seal": ""}))})

    def check_seal(self, what: str) -> None:
        """IntegrityError unless the seal fits."""
        if self.sealed().seal != self.seal:
            raise IntegrityError(f"{what} was changed: it does not hash to its own seal")


class BaseRecord(Sealed):
    """The lineage's first version: a folder that is only ever read."""

    format: Literal[1] = 1
    name: str
    folder: str
    """Where its files are; may be moved, the digests may not change."""
    manifest: dict[str, Digest]
    """Parameter -> digest of its raw bytes, tied parameters once."""
    digest: Digest
    """Of the manifest."""
    files: dict[str, Digest]
    """Configuration and tokenizer files."""

    @property
    def identity(self) -> str:
        """Digest of all but the place: what the first version names as its parent's record."""
        return digest_of(self.model_copy(update={"folder": "", "seal": ""}))


class StoredTensor(Record):
    """One tensor that a version changed, or an activation edit that it brought or took away."""

    parameter: str
    dtype: str
    """safetensors' word, e.g. "F32"; "U8" of an activation edit's bytes."""
    shape: tuple[int, ...]
    n_bytes: int
    digest_before: Digest
    digest_after: Digest


class VersionRecord(Sealed):
    """One version: what it changed, and what the model is afterwards."""

    format: Literal[1] = 1
    generation: int
    action: Literal["edit", "roll-back"]
    edit_id: str
    """The edit that was made, or that was undone."""
    parent: str
    """Name of the version before."""
    parent_record: Digest
    """Digest of that version's record."""
    parent_digest: Digest
    """Digest of the model before."""
    manifest: dict[str, Digest]
    digest: Digest
    """Digest of the model after."""
    tensors: tuple[StoredTensor, ...]
    plan_digest: Digest | None = None

    @property
    def name(self) -> str:
        """Name of the version's folder."""
        return f"{self.generation:06d}-{'undo-' if self.action == 'roll-back' else ''}{self.edit_id}"

    @property
    def parameters(self) -> frozenset[str]:
        """Parameters that the version changed."""
        return frozenset(tensor.parameter for tensor in self.tensors)


class Pointer(Record):
    """CURRENT: the live version."""

    format: Literal[1] = 1
    version: str
    record: Digest


@dataclass(frozen=True)
class Lineage:
    """The base and every version from the first to the live one, each checked against the next one's word."""

    base: BaseRecord
    versions: tuple[VersionRecord, ...]
    record: str
    """Digest of the live version's record."""

    @property
    def version(self) -> str:
        """Name of the live version."""
        return self.versions[-1].name if self.versions else BASE

    @property
    def generation(self) -> int:
        """0 for the base; grows with each commit and each roll back."""
        return self.versions[-1].generation if self.versions else 0

    @property
    def manifest(self) -> dict[str, str]:
        """Parameter -> digest, of the live version."""
        return dict(self.versions[-1].manifest if self.versions else self.base.manifest)

    @property
    def digest(self) -> str:
        """Digest of the live model."""
        return self.versions[-1].digest if self.versions else self.base.digest

    def upto(self, version: str) -> Lineage:
        """The lineage as it was when `version` (a version's name, or an edit's id) was live."""
        if version == BASE:
            return Lineage(self.base, (), self.base.identity)
        for position, record in enumerate(self.versions):
            if version == record.name or (version == record.edit_id and record.action == "edit"):
                return Lineage(self.base, self.versions[: position + 1], digest_of_bytes(canonical(record)))
        raise NotFoundError(
            f"no version {version!r}; there are {', '.join([BASE, *(v.name for v in self.versions)])}"
        )

    def followed_by(self, record: VersionRecord) -> Lineage:
        """The lineage with one more version; IntegrityError unless it continues this one."""
        after = Lineage(self.base, (*self.versions, record), digest_of_bytes(canonical(record)))
        check_manifests(after)
        return after

    def edit(self, edit_id: str) -> VersionRecord | None:
        """The version that committed this edit, or None."""
        return next((v for v in self.versions if v.edit_id == edit_id and v.action == "edit"), None)

    def undone(self, edit_id: str) -> bool:
        """Whether the edit was rolled back."""
        return any(v.edit_id == edit_id and v.action == "roll-back" for v in self.versions)

    def standing_on(self, edit: VersionRecord) -> tuple[VersionRecord, ...]:
        """Later edits, not undone, that touch a tensor of `edit`; the latest first."""
        later = [v for v in self.versions if v.generation > edit.generation and v.action == "edit"]
        return tuple(
            v for v in reversed(later) if v.parameters & edit.parameters and not self.undone(v.edit_id)
        )

    def holder(self, parameter: str) -> str:
        """Name of the version whose folder holds the live bytes of `parameter`, or "base".

        The base holds no activation edit: one that is not live has its bytes, none, there.
        """
        if held_in(self.manifest, parameter) == held_in(self.base.manifest, parameter):
            return BASE
        return next(v.name for v in reversed(self.versions) if parameter in v.parameters)


def held_in(manifest: Mapping[str, str], parameter: str) -> str | None:
    """Digest of what a manifest holds under a name: of no bytes for an activation edit that is not there."""
    return manifest.get(parameter, ABSENT if is_activation(parameter) else None)


def replaced(manifest: Mapping[str, str], tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """The manifest once a version's tensors are in place; an activation edit of no bytes is not there any more."""
    after = {**manifest, **{tensor.parameter: tensor.digest_after for tensor in tensors}}
    return {name: digest for name, digest in after.items() if digest != ABSENT or not is_activation(name)}


def check_edit_id(edit_id: str) -> str:
    """An id that is safe as a folder's name. BadRequestError otherwise."""
    if not _EDIT_ID.fullmatch(edit_id):
        raise BadRequestError(
            f"edit id {edit_id!r}: 1 to 64 of a-z, 0-9, dot, dash and underscore are allowed"
        )
    return edit_id


def check_parameter(parameter: str) -> str:
    """A parameter name that is safe as a file's name. BadRequestError otherwise."""
    if not _PARAMETER.fullmatch(parameter):
        raise BadRequestError(f"parameter name {parameter!r} cannot be a file's name")
    return parameter


def read_base(path: Path) -> BaseRecord:
    """base.json; IntegrityError when it does not agree with itself."""
    base = parse_record(BaseRecord, read_bytes(path), expected=None, what=path.name)
    base.check_seal(path.name)
    if digest_of(dict(base.manifest)) != base.digest:
        raise IntegrityError(f"{path.name} was changed: its manifest does not hash to its digest")
    return base


def read_lineage(model: Path) -> Lineage:
    """Follow CURRENT down to the base. IntegrityError names the first record that does not fit."""
    base = read_base(model / "base.json")
    try:
        pointer = Pointer.model_validate_json(read_bytes(model / "CURRENT"))
    except ValidationError as error:
        raise IntegrityError("CURRENT cannot be read: it was changed") from error
    versions: list[VersionRecord] = []
    name, expected = pointer.version, pointer.record
    while name != BASE:
        record = _read_version(model, name, expected)
        if versions and record.generation != versions[-1].generation - 1:
            raise IntegrityError(f"version {name} is out of order")
        versions.append(record)
        name, expected = record.parent, record.parent_record
    if expected != base.identity:
        raise IntegrityError("base.json was changed: it is not the base that the versions were made from")
    lineage = Lineage(base, tuple(reversed(versions)), pointer.record)
    check_manifests(lineage)
    return lineage


def _read_version(model: Path, name: str, expected: str) -> VersionRecord:
    if not _VERSION.fullmatch(name):
        raise IntegrityError(f"{name!r} is not the name of a version")
    path = model / "versions" / name / "version.json"
    record = parse_record(VersionRecord, read_bytes(path), expected=expected, what=f"{name}/version.json")
    if record.name != name:
        raise IntegrityError(f"version {name} was moved: it says that it is {record.name}")
    return record


def check_manifests(lineage: Lineage) -> None:
    """Each version's manifest is its parent's with the changed tensors replaced, and hashes to its digest."""
    manifest, digest = dict(lineage.base.manifest), lineage.base.digest
    for generation, version in enumerate(lineage.versions, start=1):
        before = {t.parameter: t.digest_before for t in version.tensors}
        fits = version.generation == generation and version.parent_digest == digest
        if not fits or any(held_in(manifest, p) != d for p, d in before.items()):
            raise IntegrityError(f"version {version.name} does not continue the one before it")
        manifest = replaced(manifest, version.tensors)
        digest = version.digest
        if version.manifest != manifest or digest_of(manifest) != digest:
            raise IntegrityError(f"version {version.name} has a manifest that is not its own")


def read_bytes(path: Path) -> bytes:
    """A file that has to be there. IntegrityError when it is not."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
