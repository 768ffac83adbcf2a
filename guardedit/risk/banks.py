"""Banks of keys: what ordinary text and protected facts look like to the rewrite module, with the words around them.

A bank is computed on first use, in seconds, and kept under the cache folder by the digest of all that it was made of:
the weights upstream of the key space, the text and the layer. An edit of the layer itself changes none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.config import cache_folder
from guardedit.edits.keys import keys_at_last, keys_at_subjects
from guardedit.errors import IntegrityError
from guardedit.models.control import control_digest, control_texts, load_facts
from guardedit.models.corpus import tokenise_chunks
from guardedit.models.handle import ModelHandle, preserved, tensor_digest
from guardedit.models.hooks import key_hook, record
from guardedit.models.tensorfiles import read_tensors, write_tensors
from guardedit.records import digest_of

BANK_DOMAINS = ("prose", "chat", "python", "arithmetic")
PROTECTED_DOMAINS = ("facts", "python", "prose")
ROW = 128
"""Tokens of a row of control text."""
AROUND = 8
"""Tokens of context kept on each side of a key's own."""
_FORMAT = "guardedit.key_bank/1"


@dataclass(frozen=True)
class KeyBank:
    """Keys of many tokens at one layer, position 0 left out, with the words they stand in."""

    keys: Float[Tensor, "n d_in"]
    """float32."""
    tokens: tuple[str, ...]
    contexts: tuple[str, ...]
    """Some eight tokens on each side."""
    domains: tuple[str, ...]
    subjects: tuple[str, ...]
    """Subject of the fact that a key belongs to, "" for running text."""
    digest: str
    """Of the weights upstream, the text and the layer."""

    def of_domain(self, domain: str, without: Sequence[str] = ()) -> Float[Tensor, "m d_in"]:
        """Keys of one domain, leaving out facts about the subjects in `without`."""
        return self.keys[self._rows(domain, without)]

    def part(self, domain: str, without: Sequence[str] = ()) -> KeyBank:
        """The bank of one domain, leaving out facts about the subjects in `without`."""
        rows = self._rows(domain, without)
        words = (self.tokens, self.contexts, self.domains, self.subjects)
        tokens, contexts, domains, subjects = (tuple(column[row] for row in rows) for column in words)
        return KeyBank(self.keys[rows], tokens, contexts, domains, subjects, self.digest)

    def _rows(self, domain: str, without: Sequence[str]) -> list[int]:
        left_out = {subject.casefold() for subject in without}
        named = enumerate(zip(self.domains, self.subjects, strict=True))
        return [
            row for row, (name, subject) in named
            if name == domain and not (subject and subject.casefold() in left_out)
        ]  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """One key's words."""

    token: str
    context: str
    domain: str
    subject: str = ""


_Make = Callable[[Sequence[int]], tuple[dict[int, Tensor], list[_Row]]]
"""Keys at the layers asked for, and the words they stand in, which are the same at each."""


def control_bank(handle: ModelHandle, layer: int, n_tokens: int = 4000, seed: int = 0) -> KeyBank:
    """Keys of about `n_tokens` tokens of control text (half "calibrate"), the same number from each domain."""
    return control_banks(handle, (layer,), n_tokens, seed)[layer]


def control_banks(
    handle: ModelHandle, layers: Sequence[int], n_tokens: int = 4000, seed: int = 0
) -> dict[int, KeyBank]:
    """`control_bank` at several layers, of the same tokens; what is not cached is read in one go."""
    each = n_tokens // len(BANK_DOMAINS)
    texts = {domain: control_texts(handle, domain, each + 2 * ROW, seed) for domain in BANK_DOMAINS}
    recipe = {
        "kind": "control",
        "each": each,
        **{name: control_digest(lines) for name, lines in texts.items()},
    }
    return _cached(handle, layers, recipe, lambda missing: _text_keys(handle, missing, texts, each))


def protected_bank(handle: ModelHandle, layer: int, n_tokens: int = 2000, seed: int = 0) -> KeyBank:
    """Keys that an edit must leave alone: facts at subject and last token, Python code, prose (other text than the
    control bank's where there is enough of it). A model that knows none of its facts has no rows of them."""
    return protected_banks(handle, (layer,), n_tokens, seed)[layer]


def protected_banks(
    handle: ModelHandle, layers: Sequence[int], n_tokens: int = 2000, seed: int = 0
) -> dict[int, KeyBank]:
    """`protected_bank` at several layers, of the same tokens; what is not cached is read in one go."""
    facts = load_facts(handle)
    each = n_tokens // 2
    texts = {name: control_texts(handle, name, each + 2 * ROW, seed + 1) for name in ("python", "prose")}
    recipe = {"kind": "protected", "each": each, "facts": control_digest(fact.filled for fact in facts)}
    recipe |= {name: control_digest(lines) for name, lines in texts.items()}

    def make(missing: Sequence[int]) -> tuple[dict[int, Tensor], list[_Row]]:
        keys, rows = _text_keys(handle, missing, texts, each)
        if not facts:
            return keys, rows
        prompts, subjects = [fact.filled for fact in facts], [fact.subject for fact in facts]
        at_subject = keys_at_subjects(handle, prompts, subjects, missing)
        at_last = {layer: keys_at_last(handle, prompts, layer) for layer in missing}
        told = [_Row(fact.subject.split()[-1], fact.filled, "facts", fact.subject) for fact in facts]
        ends = [_Row(fact.filled.split()[-1], fact.filled, "facts", fact.subject) for fact in facts]
        whole = {
            layer: torch.cat([keys[layer], at_subject[layer].float(), at_last[layer].float()])
            for layer in missing
        }
        return whole, [*rows, *told, *ends]

    return _cached(handle, layers, recipe, make)


def _text_keys(
    handle: ModelHandle, layers: Sequence[int], texts: dict[str, list[str]], each: int
) -> tuple[dict[int, Float[Tensor, "n d_in"]], list[_Row]]:
    """Keys of up to `each` tokens a domain."""
    names = {layer: key_hook(layer) for layer in layers}
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    rows: list[_Row] = []
    for domain, lines in texts.items():
        left = each
        for ids, mask in tokenise_chunks(handle, lines, length=ROW, batch_size=8):
            if left <= 0:
                break
            with torch.no_grad(), record(handle, list(names.values()), stop=True) as seen:
                handle.hidden(ids, mask)
            where = mask.bool()
            where[:, 0] = False
            places = where.nonzero()[:left]
            for layer, name in names.items():
                found[layer].append(seen[name][places[:, 0], places[:, 1]].float().cpu())
            rows += [
                _words(handle, ids[row], int(mask[row].sum()), at, domain) for row, at in places.tolist()
            ]
            left -= len(places)
    return {layer: torch.cat(parts) for layer, parts in found.items()}, rows


def _words(handle: ModelHandle, ids: Tensor, length: int, at: int, domain: str) -> _Row:
    start, end = max(0, at - AROUND), min(length, at + AROUND + 1)
    decode = handle.tokenizer.decode
    return _Row(str(decode(ids[at : at + 1].tolist())), str(decode(ids[start:end].tolist())), domain)


def _cached(
    handle: ModelHandle, layers: Sequence[int], recipe: dict[str, object], make: _Make
) -> dict[int, KeyBank]:
    """The banks of this recipe from the cache, or computed and put there. A file that is broken is made anew."""
    upstream = _upstream(handle, layers)
    digests = {
        layer: digest_of({**recipe, "format": _FORMAT, "layer": layer, "upstream": upstream[layer]})
        for layer in layers
    }
    paths = {
        layer: cache_folder() / "banks" / f"{digest.removeprefix('sha256:')}.safetensors"
        for layer, digest in digests.items()
    }
    found = {layer: _read_cached(paths[layer], digests[layer]) for layer in layers}
    missing = [layer for layer, bank in found.items() if bank is None]
    if missing:
        with preserved(handle):
            keys, rows = make(missing)
        found |= {layer: _bank(keys[layer], rows, digests[layer]) for layer in missing}
    banks = {layer: bank for layer, bank in found.items() if bank is not None}
    for layer in missing:
        _write(paths[layer], banks[layer])
    return banks


def _upstream(handle: ModelHandle, layers: Sequence[int]) -> dict[int, str]:
    """What the keys of each layer depend on; the weights are hashed once however many layers there are."""
    if len(layers) == 1:
        return {layers[0]: handle.upstream_digest(layers[0])}
    manifest = handle.manifest()
    return {layer: handle.hook_digest(key_hook(layer), manifest) for layer in layers}


def _bank(keys: Tensor, rows: Sequence[_Row], digest: str) -> KeyBank:
    return KeyBank(
        keys=keys,
        tokens=tuple(row.token for row in rows),
        contexts=tuple(row.context for row in rows),
        domains=tuple(row.domain for row in rows),
        subjects=tuple(row.subject for row in rows),
        digest=digest,
    )


def _read_cached(path: Path, digest: str) -> KeyBank | None:
    try:
        return _read(path, digest) if path.is_file() else None
    except IntegrityError:
        return None  # a cache: what is broken in it is computed again from what it was made of


def _write(path: Path, bank: KeyBank) -> None:
    words = json.dumps([bank.tokens, bank.contexts, bank.domains, bank.subjects], ensure_ascii=False)
    seal = digest_of({"keys": tensor_digest(bank.keys), "words": hashlib.sha256(words.encode()).hexdigest()})
    write_tensors(path, {"keys": bank.keys}, {"words": words, "seal": seal, "digest": bank.digest})


def _read(path: Path, digest: str) -> KeyBank:
    """Raises IntegrityError unless the file is whole and the one asked for."""
    tensors, metadata = read_tensors(path)
    try:
        keys, words = tensors["keys"], metadata["words"]
        seal = digest_of({"keys": tensor_digest(keys), "words": hashlib.sha256(words.encode()).hexdigest()})
        whole = seal == metadata["seal"] and digest == metadata["digest"]
    except KeyError as error:
        raise IntegrityError(f"{path} is not a key bank: {error}") from error
    if not whole:
        raise IntegrityError(f"{path} was changed")
    tokens, contexts, domains, subjects = (tuple(column) for column in json.loads(words))
    return KeyBank(keys, tokens, contexts, domains, subjects, digest)
