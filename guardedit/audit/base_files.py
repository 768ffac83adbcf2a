"""The base model's folder: read, hashed and checked, never written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from guardedit.audit.lineage import BaseRecord, check_parameter
from guardedit.audit.safetensors_bytes import TensorSpan, digest_span, locate, read_folder
from guardedit.errors import BadModelError, BadRequestError, IntegrityError, MissingModelError
from guardedit.records import digest_of, is_activation

_MEANING = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.json",
)
_MEANING_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "spiece.model")
_OTHER_WEIGHTS = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".safetensors")


def meaningful_files(folder: Path) -> dict[str, Path]:
    """Configuration and tokenizer files: they decide what the weights mean, so their digests are kept."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in _MEANING or any(path.match(p) for p in _MEANING_PATTERNS))
    }


def companion_files(folder: Path) -> tuple[Path, ...]:
    """What an export copies beside the weights. Weights in other formats would be the unedited model: left out."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _OTHER_WEIGHTS
    )


def file_digest(path: Path) -> str:
    """`sha256:…` of a file."""
    try:
        with path.open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error


def describe(name: str, folder: Path, manifest: Mapping[str, str]) -> BaseRecord:
    """The record of a base whose bytes have all been read and are those that `manifest` names."""
    if not folder.is_dir():
        raise MissingModelError(f"{folder} is not a folder; load the model first")
    plain = dict(sorted(manifest.items()))
    installed = [name for name in plain if is_activation(name)]
    if installed:
        raise BadRequestError(
            f"the model has activation edits in force ({', '.join(installed)}) that no plan brought; take them out "
            "before the model is guarded"
        )
    base = BaseRecord(
        name=name,
        folder=str(folder.absolute()),
        manifest={check_parameter(parameter): digest for parameter, digest in plain.items()},
        digest=digest_of(plain),
        files={file: file_digest(path) for file, path in meaningful_files(folder).items()},
    ).sealed()
    check_weights(base)
    return base


def spans_of(base: BaseRecord) -> dict[str, TensorSpan]:
    """Where each parameter of the base lies."""
    folder = Path(base.folder)
    if not folder.is_dir():
        raise MissingModelError(
            f"the base model's folder {folder} is gone; load {base.name} again to restore it"
        )
    spans = read_folder(folder)
    return {parameter: locate(parameter, spans) for parameter in base.manifest}


def check_weights(base: BaseRecord) -> int:
    """Hash every parameter of the base from its bytes; returns how many bytes were read.

    IntegrityError names the first parameter whose bytes are not those on record.
    """
    total = 0
    for parameter, span in spans_of(base).items():
        if digest_span(span) != base.manifest[parameter]:
            raise IntegrityError(
                f"base model: the bytes of {parameter} ({span.dtype} in {span.file.name}) do not hash to the manifest; "
                "the file was changed, or the model was loaded in another dtype than its files hold"
            )
        total += span.n_bytes
    return total


def check_base(base: BaseRecord) -> int:
    """Weights, configuration and tokenizer are what they were. What cannot be parsed any more was changed."""
    try:
        total = check_weights(base)
    except BadModelError as error:
        raise IntegrityError(f"base model: {error}") from error
    for name, digest in base.files.items():
        if file_digest(Path(base.folder) / name) != digest:
            raise IntegrityError(f"base model: {name} was changed")
    return total
