"""Safetensors files written atomically and durably (the library renames, but never syncs)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from torch import Tensor

from guardedit.errors import IntegrityError, StorageError


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one file: complete and on disk, or not at all. Raises StorageError where the disk refuses."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def _replace(path: Path, data: bytes) -> None:
    # Not mkstemp: its files are private to the user, and these are read by others and packed into wheels.
    part = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; raises IntegrityError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
