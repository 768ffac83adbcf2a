"""A folder with tensors and the card that says what they are: written card last, refused where a byte is not as it was.

The card names the digest of the tensors' bytes and carries a seal over itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor

from guardedit.errors import IntegrityError, MissingStatisticsError
from guardedit.records import Digest, Record, digest_of, digest_of_bytes
from guardedit.saes.files import write_atomically

CARD = "card.json"


class SealedCard(Record):
    """What every card says."""

    tensors_digest: Digest
    """Of the bytes of the tensors' file."""


C = TypeVar("C", bound=SealedCard)


def write_pair(folder: Path, name: str, data: bytes, card: SealedCard) -> None:
    """Write tensors, then the card: a torn pair has none, and is refused when it is read."""
    plain = card.model_dump(mode="json")
    sealed = {**plain, "seal": digest_of(plain)}
    (folder / CARD).unlink(missing_ok=True)
    write_atomically(folder / name, data)
    write_atomically(folder / CARD, (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode())


def read_pair(folder: Path, name: str, kind: type[C], how: str) -> tuple[dict[str, Tensor], C]:
    """Tensors and card; `how` says how such a folder is made.

    Raises MissingStatisticsError where there is none, IntegrityError where a byte was changed.
    """
    if not (folder / CARD).is_file() or not (folder / name).is_file():
        raise MissingStatisticsError(f"there is no {name} with its card in {folder}; {how}")
    card, data = _card(folder / CARD, kind), (folder / name).read_bytes()
    if digest_of_bytes(data) != card.tensors_digest:
        raise IntegrityError(f"{folder / name} was changed: it is not the one that its card names")
    try:
        return from_bytes(data), card
    except SafetensorError as error:
        raise IntegrityError(f"{folder / name} cannot be read: {error}") from error


def _card(path: Path, kind: type[C]) -> C:
    try:
        plain: dict[str, Any] = json.loads(path.read_bytes())
        seal = plain.pop("seal")
        card = kind.model_validate(plain)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    if digest_of(card) != seal:
        raise IntegrityError(f"{path} was changed: it does not hash to its own seal")
    return card
