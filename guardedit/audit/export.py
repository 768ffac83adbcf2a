"""A version as a plain Hugging Face folder: the base's files with the bytes of the changed tensors replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from guardedit.audit import files
from guardedit.audit.base_files import companion_files, spans_of
from guardedit.audit.lineage import BaseRecord
from guardedit.audit.safetensors_bytes import TensorSpan, digest_span, weight_files
from guardedit.audit.versions import VersionStore
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.records import is_activation


def export(
    store: VersionStore,
    target: Path,
    version: str | None = None,
    *,
    free: Callable[[Path], int] = files.free_bytes,
) -> str:
    """Write the live (or a named) version to `target`, which must not exist or be empty; returns its digest.

    The folder appears complete or not at all, and every parameter is hashed again from the file written. Raises
    BadRequestError for a version with activation edits: a folder of weights cannot hold them.
    """
    _refuse_activations(store, version)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadRequestError(f"{target} exists and is not an empty folder; name another one")
    base, manifest = store.base(), store.manifest(version)
    changed = {p: store.read(p, version).data for p in store.live_overrides(version)}
    sources = (*weight_files(Path(base.folder)), *companion_files(Path(base.folder)))
    files.require_space(target, sum(path.stat().st_size for path in sources), free)
    files.make_folder(target.absolute().parent)
    temporary = files.make_temporary_folder(target.absolute().parent)
    try:
        _copy(sources, temporary)
        _replace(spans_of(base), changed, temporary)
        _check(base, manifest, temporary)
        _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return store.digest(version)


def _refuse_activations(store: VersionStore, version: str | None) -> None:
    names = [name for name in store.live_overrides(version) if is_activation(name)]
    if not names:
        return
    lineage = store.lineage() if version is None else store.lineage().upto(version)
    holders = {lineage.holder(name) for name in names}
    edits = ", ".join(one.edit_id for one in lineage.versions if one.name in holders)
    raise BadRequestError(
        f"edits that act on activations cannot be kept in a folder of weights: {edits} ({', '.join(names)}). Use the "
        "model through guardedit.load, or roll them back before exporting"
    )


def _copy(sources: tuple[Path, ...], folder: Path) -> None:
    for source in sources:
        with files.storing(folder / source.name):
            shutil.copyfile(source, folder / source.name)


def _replace(spans: dict[str, TensorSpan], changed: dict[str, bytes], folder: Path) -> None:
    for parameter, data in changed.items():
        span = spans[parameter]
        with files.storing(folder / span.file.name), (folder / span.file.name).open("r+b") as stream:
            stream.seek(span.start)
            stream.write(data)


def _check(base: BaseRecord, manifest: dict[str, str], folder: Path) -> None:
    copy = base.model_copy(update={"folder": str(folder)})
    for parameter, span in spans_of(copy).items():
        if digest_span(span) != manifest[parameter]:
            raise IntegrityError(
                f"export: the bytes of {parameter} are not those on record; run `guardedit verify`"
            )


def _publish(temporary: Path, target: Path) -> None:
    with files.storing(target):
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        files.sync_folder(temporary)
        if target.exists():
            target.rmdir()
    files.move_folder(temporary, target.absolute())
