"""What a new model needs before it can be edited: the second moment of a layer's key space, and a kit for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from guardedit.config import cache_folder
from guardedit.errors import BadRequestError
from guardedit.models.corpus import read_texts, sample_texts, tokenise_chunks
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import SecondMoment, collect
from guardedit.pipeline.kit import KIT_FILE, kit_folder, read_kit, write_kit

ROW = 128
"""Tokens a row: long enough for a sentence or three in context, short enough to keep rows varied."""


def collect_statistics(
    handle: ModelHandle,
    layer: int,
    texts: Sequence[Path],
    n_tokens: int,
    seed: int = 0,
    out: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> SecondMoment:
    """Collect the layer's second moment over `n_tokens` of the given files, or of the model's own words without any.

    Files are read in turn, a text each, shuffled by `seed`, so that each is a domain of its own share. Resumable. The
    result joins the model's kit (`out`, or where `load_kit` looks), which is made if there is none.
    """
    folder = out or kit_folder(handle.name)
    names = ", ".join(path.name for path in texts) or "text sampled from the model itself"
    state = cache_folder() / "statistics" / f"{handle.upstream_digest(layer)[7:23]}-{seed}.safetensors"
    found = collect(
        handle,
        [key_hook(layer)],
        tokenise_chunks(handle, _texts(handle, texts, n_tokens, seed), ROW, 8),
        corpus_note=f"{names}; rows of {ROW} tokens, seed {seed}",
        max_tokens=n_tokens,
        state=state,
        progress=progress,
    )[key_hook(layer)]
    path = folder / "second_moments" / f"{key_hook(layer)}.safetensors"
    saved = found.save(path, compact=True)
    _join_kit(folder, layer)
    state.unlink(missing_ok=True)
    return saved


def _texts(handle: ModelHandle, files: Sequence[Path], n_tokens: int, seed: int) -> Iterator[str]:
    if not files:
        return iter(sample_texts(handle, 1 + n_tokens // 100, ROW, seed))
    shuffled = []
    for path in files:
        texts = list(read_texts(path))
        if not texts:
            raise BadRequestError(f"{path} holds no text")
        random.Random(seed).shuffle(texts)
        shuffled.append(texts)
    return (text for text in chain.from_iterable(zip_longest(*shuffled)) if text is not None)


def _join_kit(folder: Path, layer: int) -> None:
    known = read_kit(folder / KIT_FILE) if (folder / KIT_FILE).is_file() else {"hparams": {}}
    write_kit(folder, layer=layer, hparams=known["hparams"])
