"""Text for statistics and SAEs: read it, cut it into rows of tokens, or sample it from the model itself."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models import tokens
from guardedit.models.handle import ModelHandle, preserved

Batch = tuple[Tensor, Tensor]
"""input_ids and attention_mask, each (batch, seq)."""

MIN_ROW = 16
"""Shortest row kept: a shorter one is mostly the start of a text, whose activations are unlike any other."""


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a `.txt` file (one text) or of a `.jsonl` / `.jsonl.xz` file (a line each, field "text").

    Raises BadRequestError naming the line that has no text.
    """
    if not path.is_file():
        raise BadRequestError(f"there is no text file {path}")
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    if not path.name.endswith((".jsonl", ".jsonl.xz")):
        raise BadRequestError(f"{path.name}: texts are read from .txt, .jsonl or .jsonl.xz")
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(line, f"{path.name} line {number}")


def _opened(path: Path) -> TextIO:
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")


def _text_of(line: str, where: str) -> str:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequestError(f"{where} is not JSON: {error}") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise BadRequestError(f'{where} has no string in the field "text"')
    return text


def tokenise_chunks(
    handle: ModelHandle, texts: Iterable[str], length: int = 256, batch_size: int = 4
) -> Iterator[Batch]:
    """Rows of at most `length` tokens, one piece of one text each, in batches of `batch_size`; deterministic.

    Pieces under 16 tokens are dropped. Nothing is packed across texts, so a row never sees another text.
    """
    if not MIN_ROW <= length <= handle.context_length:
        raise BadRequestError(f"length {length}: rows have {MIN_ROW} to {handle.context_length} tokens")
    rows: list[tokens.Tokens] = []
    for piece in _pieces(handle, texts, length):
        rows.append(piece)
        if len(rows) == batch_size:
            yield _batch(handle, rows)
            rows = []
    if rows:
        yield _batch(handle, rows)


def _pieces(handle: ModelHandle, texts: Iterable[str], length: int) -> Iterator[tokens.Tokens]:
    for text in texts:
        if not text.strip():
            continue
        whole = tokens.tokenise(handle, text)
        for start in range(0, len(whole.ids), length):
            piece = tokens.Tokens(whole.ids[start : start + length], whole.offsets[start : start + length])
            if len(piece.ids) >= MIN_ROW:
                yield piece


def _batch(handle: ModelHandle, rows: Sequence[tokens.Tokens]) -> Batch:
    padded = tokens.pad(handle, rows)
    return padded["input_ids"], padded["attention_mask"]


def corpus_digest(batches: Iterable[Batch]) -> str:
    """`sha256:…` of the token rows as the model sees them (so it covers the tokenizer too)."""
    digest = ""
    for batch in batches:
        digest = chain_digest(digest, batch)
    return digest


def chain_digest(previous: str, batch: Batch) -> str:
    """Digest of everything up to `batch`, from the digest of everything before it ("" at the start)."""
    recipe = hashlib.sha256(f"{previous} {list(batch[0].shape)} ".encode())
    for tensor in batch:
        recipe.update(tensor.to("cpu", torch.int64).contiguous().numpy().data)
    return "sha256:" + recipe.hexdigest()


@torch.no_grad()
def sample_texts(
    handle: ModelHandle,
    n: int,
    length: int,
    seed: int,
    prompts: Sequence[str] | None = None,
    *,
    temperature: float = 1.0,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """`n` texts of up to `length` new tokens sampled from the model itself: nobody else wrote them.

    `prompts` are used in turn and kept at the front of the text; without them sampling starts from the BOS or
    EOS token. The same seed gives the same texts on the same machine. The random state is left as found.
    """
    starts = list(prompts) if prompts else [handle.tokenizer.bos_token or handle.tokenizer.eos_token or "The"]
    generator = torch.Generator(device=handle.device).manual_seed(seed)
    texts: list[str] = []
    with preserved(handle):
        while len(texts) < n:
            chosen = [starts[i % len(starts)] for i in range(len(texts), min(n, len(texts) + batch_size))]
            batch = handle.encode(chosen, side="left")
            ids = _continue(
                handle, batch["input_ids"], batch["attention_mask"], length, temperature, generator
            )
            texts.extend(_decode(handle, row) for row in ids)
            if progress is not None:
                progress(len(texts))
    return texts


def _continue(
    handle: ModelHandle,
    ids: Tensor,
    mask: Tensor,
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Ancestral sampling with a key-value cache, EOS repeated once a row has ended: (batch, seq + new)."""
    model, eos = handle.model, handle.tokenizer.eos_token_id
    cache, new, ended = None, ids, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    out = [ids]
    for _ in range(length):
        positions = tokens.position_ids(mask)[:, -new.shape[1] :]
        step = model(
            input_ids=new,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = step.past_key_values
        new = torch.multinomial(
            (step.logits[:, -1].float() / temperature).softmax(-1), 1, generator=generator
        )
        if eos is not None:
            new = new.masked_fill(ended[:, None], eos)
            ended |= new[:, 0] == eos
        out.append(new)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if bool(ended.all()):
            break
    return torch.cat(out, dim=1)


def _decode(handle: ModelHandle, ids: Tensor) -> str:
    return str(handle.tokenizer.decode(ids, skip_special_tokens=True))
