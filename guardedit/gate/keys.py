"""Keys of people and services: Ed25519, private halves as files of one user, envelopes that they sign. No torch.

An envelope is DSSE: the signature covers the payload's bytes and its type. A payload is canonical JSON.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from guardedit.errors import BadRequestError, IntegrityError, NotFoundError, StorageError
from guardedit.records import Record, canonical

Passphrase = Callable[[str], str | None]
"""Asked with a key's name, where its file is encrypted; None where nobody can say."""
MIN_PASSPHRASE = 8
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")


class PublicKey(Record):
    """The public half of a key."""

    key_id: str
    public: str
    """PEM."""


class PrivateKey:
    """A key that can sign; its bytes are never printed or recorded."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._signer = CryptoSigner(private, SSlibKey.from_crypto(private.public_key()))
        self.public = _described(private.public_key())

    def sign(self, payload: bytes, payload_type: str) -> dict[str, Any]:
        """A DSSE envelope around `payload`."""
        envelope = Envelope(payload, payload_type, {})
        envelope.sign(self._signer)
        return dict(envelope.to_dict())


def _described(key: Ed25519PublicKey) -> PublicKey:
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return PublicKey(key_id=SSlibKey.from_crypto(key).keyid, public=pem)


def _path(folder: Path, name: str, suffix: str) -> Path:
    if not _NAME.match(name):
        raise BadRequestError(f"{name[:80]!r} is not a key's name; use a-z, 0-9, dots and dashes")
    return folder / f"{name}{suffix}"


def new_key(folder: Path, name: str, passphrase: str | None = None) -> PublicKey:
    """Make `NAME.pem` (for its owner alone; encrypted where there is a passphrase) and `NAME.pub` in `folder`.

    BadRequestError for a name that cannot be one or is taken, or a passphrase that is too short; StorageError where the
    folder cannot be written.
    """
    secret, public = _path(folder, name, ".pem"), _path(folder, name, ".pub")
    private = Ed25519PrivateKey.generate()
    data, made = _encoded(private, passphrase), _described(private.public_key())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Both files are new, so that a link that lies there already leads nothing astray.
        _write_new(secret, data, 0o600)
        _write_new(public, made.public.encode(), 0o644)
    except FileExistsError as error:
        raise BadRequestError(f"a key {name!r} is in {folder} already; take another name") from error
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from error
    return made


def _write_new(path: Path, data: bytes, mode: int) -> None:
    # The mode is given when the file is made: there is no moment at which others could read it.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def _encoded(private: Ed25519PrivateKey, passphrase: str | None) -> bytes:
    if passphrase is not None and len(passphrase) < MIN_PASSPHRASE:
        raise BadRequestError(
            f"the passphrase has {len(passphrase)} characters; take at least {MIN_PASSPHRASE}"
        )
    how = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase.encode())
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


def load_key(folder: Path, name: str, ask: Passphrase | None = None) -> PrivateKey:
    """A private key by name; `ask` is called where its file is encrypted.

    NotFoundError where it is not there; BadRequestError for a link, a file that others may read, or a wrong passphrase.
    """
    path = _path(folder, name, ".pem")
    try:
        data, found = _read_plain(path)
    except OSError as error:
        if path.is_symlink():
            raise BadRequestError(f"{path} is a link; a private key is a file of its own") from error
        raise NotFoundError(f"no key {name!r} in {folder}; `guardedit keys new {name}` makes one") from error
    if found.st_mode & 0o077:
        raise BadRequestError(f"{path} may be read by others; `chmod 600` it, or make another key")
    if b"ENCRYPTED" not in data.split(b"\n", 1)[0]:
        return PrivateKey(_private(data, path))
    passphrase = ask(name) if ask is not None else None
    if not passphrase:
        raise BadRequestError(
            f"{path} is encrypted; give its passphrase at the prompt or in $GUARDEDIT_KEY_PASSPHRASE"
        )
    return PrivateKey(_private(data, path, passphrase.encode()))


def _read_plain(path: Path) -> tuple[bytes, os.stat_result]:
    """Bytes and mode of one and the same regular file; links are not followed."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BadRequestError(f"{path} is not a plain file")
        return file.read(), found


def names(folder: Path) -> dict[str, PublicKey]:
    """Public halves of the keys in a folder, by name."""
    return {path.stem: read_public(path) for path in sorted(folder.glob("*.pub"))}


def _private(data: bytes, path: Path, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(data, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise BadRequestError(f"{path} does not open with this passphrase, or was changed") from error
        raise BadRequestError(f"{path} is not a private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadRequestError(f"{path} is not an Ed25519 key")
    return key


def read_public(path: Path) -> PublicKey:
    """A public key's file (PEM). BadRequestError where it is none, or of another kind than Ed25519."""
    try:
        return parse_public(path.read_bytes(), str(path))
    except OSError as error:
        raise BadRequestError(f"{path} cannot be read: {error.strerror}") from error


def parse_public(pem: bytes, where: str) -> PublicKey:
    """PEM to a public key with its id, which is computed, never taken from elsewhere. BadRequestError as above."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadRequestError(f"{where} is not a public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BadRequestError(f"{where} is not an Ed25519 key")
    return _described(key)


def opened(envelope: Any, payload_type: str, key: PublicKey) -> bytes:
    """The payload of an envelope that `key` signed. IntegrityError for anything else."""
    found = parse_public(key.public.encode(), f"key {key.key_id[:12]}")
    try:
        public = load_pem_public_key(found.public.encode())
        # `from_dict` changes what it is given.
        parsed = Envelope.from_dict({**envelope, "signatures": [dict(s) for s in envelope["signatures"]]})
        if parsed.payload_type != payload_type:
            raise IntegrityError(f"the envelope holds {parsed.payload_type!r}, not {payload_type!r}")
        parsed.verify([SSlibKey.from_crypto(public, keyid=found.key_id)], 1)
    except (VerificationError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"the signature of key {key.key_id[:12]} does not fit: {error}") from error
    return bytes(parsed.payload)


def require_signed(envelope: Any, record: Record, payload_type: str, key: PublicKey) -> None:
    """IntegrityError unless `key` signed exactly these fields of `record`."""
    if opened(envelope, payload_type, key) != canonical(record):
        raise IntegrityError("what was signed is not what is on record")
