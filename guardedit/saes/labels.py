"""Latents in words: the tokens that drive each one, and contexts that may be shipped.

A label is made of single tokens and comes from training text. Examples are pieces of text, so they come only from text
that nobody else wrote: sampled from the model, or the Python standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guardedit.saes.cards import Labels, LatentLabel
from guardedit.saes.gather import TOKENS_PER_BATCH, activations
from guardedit.saes.texts import make_rows

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle
    from guardedit.saes.gather import Progress
    from guardedit.saes.quality import Coder, LatentStatistics

EXAMPLES = 3
WORDS = 4
AROUND = 9
"""Tokens of context on each side of an example."""
NEVER = "(never fires)"


def describe(
    handle: ModelHandle,
    hook_name: str,
    coder: Coder,
    statistics: LatentStatistics,
    texts: Mapping[str, Sequence[str]],
    source: str,
    *,
    progress: Progress | None = None,
) -> Labels:
    """Labels of all latents: words from `statistics` (training text), examples from `texts` (text that may ship)."""
    words = _words(handle, statistics)
    contexts = _examples(handle, hook_name, coder, texts, len(words), progress)
    latents = tuple(
        LatentLabel(label=label, examples=found) for label, found in zip(words, contexts, strict=True)
    )
    return Labels(hook_name=hook_name, latents=latents, source=source)


def _words(handle: ModelHandle, statistics: LatentStatistics) -> list[str]:
    """Per latent, up to WORDS tokens with the largest share of its strongest activations."""
    vocabulary: dict[int, str] = {}
    labels = []
    for values, tokens in zip(statistics.top_values.tolist(), statistics.top_tokens.tolist(), strict=True):
        shares: dict[str, float] = {}
        for value, token in zip(values, tokens, strict=True):
            if value > 0:
                word = vocabulary.setdefault(token, visible(handle.tokenizer.decode([token])))
                shares[word] = shares.get(word, 0.0) + value
        labels.append(_label(shares))
    return labels


def _label(shares: dict[str, float]) -> str:
    """`a`, `b`: words that carry at least 4 % of the activation; the single strongest one in any case."""
    if not shares:
        return NEVER
    total = sum(shares.values())
    ranked = sorted(shares, key=lambda word: (-shares[word], word))
    kept = [word for word in ranked[:WORDS] if shares[word] >= 0.04 * total] or ranked[:1]
    return ", ".join(f"`{word}`" for word in kept)


def visible(token: str) -> str:
    """A token as a reader can see it: white space spelled out, other control characters as code points."""
    stripped = token.strip(" ")
    if not stripped:
        return "␣" * max(len(token), 1)
    shown = stripped.replace("\n", "⏎").replace("\t", "⇥").replace("`", "'")
    return "".join(ch if ch.isprintable() else f"U+{ord(ch):04X}" for ch in shown)


@torch.no_grad()
def _examples(
    handle: ModelHandle,
    hook_name: str,
    coder: Coder,
    texts: Mapping[str, Sequence[str]],
    d_sae: int,
    progress: Progress | None,
) -> list[tuple[str, ...]]:
    """Per latent, the contexts of its strongest tokens, at most one a row."""
    rows = make_rows(handle, texts, 128, seed=0)
    values = torch.zeros((EXAMPLES, d_sae))
    places = torch.full((EXAMPLES, d_sae, 2), -1, dtype=torch.long)
    step = max(TOKENS_PER_BATCH // 128, 1)
    for start in range(0, len(rows.ids), step):
        batch = rows.ids[start : start + step]
        seen, mask = activations(handle, batch, [hook_name])
        for index in range(len(batch)):
            acts = coder.encode(seen[hook_name][index].float()) * mask[index][:, None]
            strongest = acts.max(0)
            _insert(values, places, strongest.values, start + index, strongest.indices)
        if progress is not None:
            progress(f"label {hook_name}", min(start + step, len(rows.ids)), len(rows.ids))
    render = _renderer(handle, rows.ids)
    return [
        tuple(
            render(*place)
            for value, place in zip(values[:, f].tolist(), places[:, f].tolist(), strict=True)
            if value > 0
        )
        for f in range(d_sae)
    ]


def _insert(values: Tensor, places: Tensor, new: Tensor, row: int, position: Tensor) -> None:
    """Keep the EXAMPLES largest of the old values and `new` (d_sae,), in place."""
    place = torch.stack([torch.full_like(position, row), position], dim=-1)
    merged, order = torch.cat([values, new[None]]).topk(len(values), dim=0)
    all_places = torch.cat([places, place[None]])
    places.copy_(all_places.gather(0, order[..., None].expand(*order.shape, 2)))
    values.copy_(merged)


def _renderer(handle: ModelHandle, ids: Sequence[NDArray[np.int32]]) -> Callable[[int, int], str]:
    def render(row: int, position: int) -> str:
        tokens = [int(i) for i in ids[row]]
        before, token, after = (
            tokens[max(position - AROUND, 0) : position],
            tokens[position],
            tokens[position + 1 :][:AROUND],
        )
        decode = handle.tokenizer.decode
        text = f"{decode(before)}‹{decode([token])}›{decode(after)}"
        return "".join("⏎" if ch == "\n" else ch if ch.isprintable() else " " for ch in text).strip()

    return render
