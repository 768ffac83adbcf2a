"""Text for autoencoders: a folder with one file a domain -> seeded rows of tokens, split by document.

A file's stem names its domain. Each document goes to `train`, `calibrate` or `test` by a hash of its text and the seed,
so the split does not depend on the order or number of files. Files in a subfolder `held_out/` are whole domains that
training never sees: their documents are all `test`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from guardedit.errors import BadRequestError
from guardedit.records import digest_of_bytes

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle

Split = Literal["train", "calibrate", "test"]
Texts = Mapping[str, Sequence[str]]
"""Domain -> documents."""

MIN_TOKENS = 4
"""Shortest row: position 0 is dropped, and one or two tokens say nothing about a text."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids in a fixed, seeded order; a prefix of them is a fair sample of the whole mix."""

    ids: tuple[NDArray[np.int32], ...]
    domain_of: tuple[int, ...]
    domains: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that give an activation: all but each row's first."""
        return sum(len(row) - 1 for row in self.ids)

    @property
    def digest(self) -> str:
        """`sha256:…` over the rows in their order."""
        return digest_of_bytes(b"".join(len(row).to_bytes(4, "little") + row.tobytes() for row in self.ids))

    @property
    def mix(self) -> dict[str, float]:
        """Share of the tokens by domain."""
        counts = np.zeros(len(self.domains))
        for row, domain in zip(self.ids, self.domain_of, strict=True):
            counts[domain] += len(row) - 1
        shares = counts / max(counts.sum(), 1.0)
        return {
            name: round(float(share), 4)
            for name, share in zip(self.domains, shares, strict=True)
            if share > 0
        }

    def prefix(self, n_tokens: int) -> Rows:
        """The first rows that hold at least `n_tokens` activations, or all of them."""
        total, end = 0, 0
        while end < len(self.ids) and total < n_tokens:
            total += len(self.ids[end]) - 1
            end += 1
        return Rows(self.ids[:end], self.domain_of[:end], self.domains)

    def balanced(self, n_tokens: int) -> Rows:
        """As `prefix`, with the same budget of tokens for each domain: for figures by domain."""
        budget = n_tokens / max(len(set(self.domain_of)), 1)
        used = np.zeros(len(self.domains))
        keep = []
        for index, domain in enumerate(self.domain_of):
            if used[domain] < budget:
                used[domain] += len(self.ids[index]) - 1
                keep.append(index)
        return Rows(tuple(self.ids[i] for i in keep), tuple(self.domain_of[i] for i in keep), self.domains)


def find_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Text files in the given files and folders (and their `held_out/`), sorted by name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [f for f in path.iterdir() if f.name.endswith((".txt", ".jsonl", ".jsonl.xz"))]
            found += list(find_files([path / "held_out"])) if (path / "held_out").is_dir() else []
        elif path.is_file():
            found.append(path)
        else:
            raise BadRequestError(
                f"there is no text at {path}; give files or folders of .txt, .jsonl or .jsonl.xz"
            )
    if not found:
        raise BadRequestError("no .txt, .jsonl or .jsonl.xz file in what was given as text")
    return tuple(sorted(found, key=lambda file: (domain_of(file), str(file))))


def domain_of(file: Path) -> str:
    """The file's stem: `fiction.jsonl.xz` -> `fiction`."""
    return file.name.split(".")[0]


def read_split(
    files: Sequence[Path], split: Split, seed: int, held_out_share: float = 0.06
) -> dict[str, list[str]]:
    """Documents of one split by domain. Half of `held_out_share` calibrates thresholds, the other half is the test."""
    from guardedit.models.corpus import read_texts

    texts: dict[str, list[str]] = {}
    for file in files:
        unseen = file.parent.name == "held_out"
        for text in read_texts(file):
            if ("test" if unseen else assign(text, seed, held_out_share)) == split:
                texts.setdefault(domain_of(file), []).append(text)
    return texts


def assign(text: str, seed: int, held_out_share: float) -> Split:
    """Which split a document belongs to; the same for the same text and seed, everywhere."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big") / 2**64
    if drawn >= held_out_share:
        return "train"
    return "calibrate" if drawn < held_out_share / 2 else "test"


def make_rows(handle: ModelHandle, texts: Texts, length: int, seed: int) -> Rows:
    """Cut documents into rows of at most `length` tokens and shuffle all rows together.

    Nothing is packed across documents. Raises BadRequestError where no row results.
    """
    if not MIN_TOKENS <= length <= handle.context_length:
        raise BadRequestError(
            f"row length {length}: {handle.name} takes {MIN_TOKENS} to {handle.context_length} tokens"
        )
    domains = tuple(sorted(texts))
    rows = [
        (piece, index)
        for index, domain in enumerate(domains)
        for text in texts[domain]
        for piece in _pieces(handle, text, length)
    ]
    if not rows:
        raise BadRequestError("the texts have no row of at least four tokens")
    random.Random(seed).shuffle(rows)
    return Rows(tuple(row for row, _ in rows), tuple(index for _, index in rows), domains)


def _pieces(handle: ModelHandle, text: str, length: int) -> list[NDArray[np.int32]]:
    if not text.strip():
        return []
    ids = np.asarray(
        handle.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"], dtype=np.int32
    )
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) >= MIN_TOKENS]
