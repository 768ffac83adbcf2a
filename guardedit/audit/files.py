"""Writing files so that a crash leaves the old content or the new one, never half of either."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from guardedit.errors import StorageError

TEMP_PREFIX = ".tmp-"
"""Names that a crash may leave behind; whoever owns the folder may delete them."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal (full, read-only, too large) into one StorageError naming the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path} cannot be written: {reason}; free space or choose another folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a loss of power."""
    with storing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_name(folder: Path) -> Path:
    """A fresh name in `folder`. (tempfile's are closed to other users, and a record is there to be read.)"""
    return folder / f"{TEMP_PREFIX}{secrets.token_hex(8)}"


def make_temporary_folder(parent: Path) -> Path:
    """A fresh folder in `parent`, on the same disk as what it shall become."""
    folder = temporary_name(parent)
    with storing(folder):
        folder.mkdir()
    return folder


def write_new(path: Path, data: bytes) -> None:
    """Write and fsync a file inside a folder that nobody reads yet."""
    with storing(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def prepare_file(path: Path, data: bytes) -> Path:
    """Write and fsync what shall become `path` under another name beside it: all that can run out of space."""
    with storing(path):
        prepared = temporary_name(path.parent)
        try:
            write_new(prepared, data)
        except BaseException:
            prepared.unlink(missing_ok=True)
            raise
    return prepared


def publish_file(prepared: Path, path: Path) -> None:
    """Make a prepared file appear as `path`, in one step and durably."""
    with storing(path):
        os.replace(prepared, path)
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` in one step: temp file in the same folder, fsync, rename, fsync of the folder."""
    publish_file(prepare_file(path, data), path)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; each new name is made durable."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for made in reversed(missing):
            sync_folder(made.parent)


def move_folder(source: Path, target: Path) -> None:
    """Rename a finished folder into place, durably on both sides. The target must not exist."""
    with storing(target):
        os.rename(source, target)
        sync_folder(target.parent)
        if source.parent != target.parent:
            sync_folder(source.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder; renamed first, so that nobody finds half of it under its old name."""
    if not folder.exists():
        return
    with storing(folder):
        doomed = temporary_name(folder.parent)
        os.rename(folder, doomed)
        sync_folder(folder.parent)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> tuple[str, ...]:
    """Delete what crashed writers left in `folder`; returns the names."""
    if not folder.is_dir():
        return ()
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith(TEMP_PREFIX))
    with storing(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tuple(names)


def free_bytes(folder: Path) -> int:
    """Free space, in bytes, where `folder` is or will be."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def require_space(folder: Path, needed: int, free: Callable[[Path], int] = free_bytes) -> None:
    """StorageError naming needed and free bytes when `needed` do not fit."""
    available = free(folder)
    if available < needed:
        raise StorageError(
            f"{folder} has {available:,} bytes free, {needed:,} are needed; free space or choose another --home"
        )
