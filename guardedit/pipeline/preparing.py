"""What a new model needs before it can be edited: the second moment of a layer's key space, and a kit for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from guardedit.config import cache_folder
from guardedit.errors import BadRequestError
from guardedit.models.corpus import read_texts, sample_texts, tokenise_chunks
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import SecondMoment, collect
from guardedit.pipeline.kit import KIT_FILE, kit_folder, read_kit, write_kit
from guardedit.records import digest_of

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
    *,
    band: bool = False,
) -> SecondMoment:
    """Collect the layer's second moment over `n_tokens` of the given files, or of the model's own words without any.

    Files are read in turn, a text each, shuffled by `seed`, so that each is a domain of its own share. Resumable. The
    result joins the model's kit (`out`, or where `load_kit` looks), which is made if there is none. The kit is then for
    this layer, but with `band`, which adds one for the editors that write several and needs a kit.
    """
    folder = out or kit_folder(handle.name)
    known = _known(folder, band)
    names = ", ".join(path.name for path in texts) or "text sampled from the model itself"
    state = cache_folder() / "statistics" / f"{handle.upstream_digest(layer)[7:23]}-{seed}.safetensors"
    found = collect(
        handle,
        [key_hook(layer)],
        tokenise_chunks(handle, texts_of(handle, texts, n_tokens, seed), ROW, 8),
        corpus_note=f"{names}; rows of {ROW} tokens, seed {seed}",
        max_tokens=n_tokens,
        state=state,
        progress=progress,
    )[key_hook(layer)]
    path = folder / "second_moments" / f"{key_hook(layer)}.safetensors"
    saved = found.save(path, compact=True)
    write_kit(folder, layer=known["layer"] if band else layer, hparams=known["hparams"])
    state.unlink(missing_ok=True)
    return saved


def moments_for(
    handle: ModelHandle,
    layers: Sequence[int],
    texts: Sequence[Path] = (),
    n_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SecondMoment]:
    """Second moments of several layers in one pass over the text, kept in the cache folder; no kit is touched.

    `n_tokens` None takes four a dimension: enough to compare layers, under the ten that an edit in earnest wants (the
    moments then carry a warning). Without `texts` the model's own words are taken.
    """
    tokens = n_tokens or 4 * max(handle.d_in(layer) for layer in layers)
    recipe = digest_of([[path.name, path.stat().st_size] for path in texts] + [tokens, seed])[7:15]
    folder = cache_folder() / "second_moments" / recipe
    paths = {
        key_hook(layer): folder / f"{handle.upstream_digest(layer)[7:23]}.safetensors" for layer in layers
    }
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        rows = tokenise_chunks(handle, texts_of(handle, texts, tokens, seed), ROW, 8)
        note = f"{tokens} tokens to compare layers with, seed {seed}"
        found = collect(handle, missing, rows, corpus_note=note, max_tokens=tokens, progress=progress)
        for name, moment in found.items():
            moment.save(paths[name], compact=True)
    return {name: SecondMoment.load(path, handle) for name, path in paths.items()}


def texts_of(handle: ModelHandle, files: Sequence[Path], n_tokens: int, seed: int) -> Iterator[str]:
    """The files' texts, a text each in turn, shuffled by `seed`; without files, text sampled from the model."""
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


def _known(folder: Path, band: bool) -> dict[str, Any]:
    """What the kit holds, where there is one."""
    path = folder / KIT_FILE
    if band and not path.is_file():
        raise BadRequestError(
            f"{folder} holds no kit that a layer could be added to; collect the layer that edits write to first, "
            "without a band"
        )
    return read_kit(path) if path.is_file() else {"hparams": {}}
