"""Keys: what the rewrite module of a layer sees at a subject's last token.

`k_star` is computed once per request and handed on. Two different keys in one formula are what makes the published
ROME collapse (Gupta et al. 2024, "Rebuilding ROME"; Yang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.settings import require_contexts
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import key_hook, record
from guardedit.records import EditRequest


@dataclass(frozen=True, eq=False)
class Key:
    """The key of one request."""

    k_star: Float[Tensor, " d_in"]
    """Mean over contexts, float64."""
    per_context: Float[Tensor, "contexts d_in"]
    position: int
    """Index of the subject's last token in the bare prompt."""
    subject_starts_text: bool
    """The subject begins at position 0 of the bare prompt, where no token stands before it."""


def subject_span(request: EditRequest, context: str = "") -> tuple[int, int]:
    """Characters (start, end) of the subject in `context` + the filled prompt."""
    start = len(context) + request.prompt.index("{}")
    return start, start + len(request.subject)


def last_token_of(offsets: Tensor, mask: Tensor, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Per row, the index of the last token that overlaps the character span.

    `offsets` is (batch, seq, 2) and `mask` (batch, seq). Raises BadRequestError where no token overlaps.
    """
    found = []
    for row, (start, end) in enumerate(spans):
        overlaps = (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start) & mask[row].bool()
        where = overlaps.nonzero().flatten()
        if not len(where):
            raise BadRequestError(
                f"no token covers characters {start} to {end}: the subject is not in its prompt"
            )
        found.append(int(where[-1]))
    return found


def key_of(handle: ModelHandle, request: EditRequest, layer: int, contexts: Sequence[str]) -> Key:
    """The request's key at `layer`, averaged over `contexts`, of which the first must be "": the bare prompt.

    Raises BadRequestError for other contexts or a layer that the model does not have.
    """
    return keys_of(handle, [request], layer, contexts)[0]


def keys_of(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    layer: int,
    contexts: Sequence[str],
    batch_size: int = 64,
) -> tuple[Key, ...]:
    """The key of each request, as `key_of` finds it; rows of similar length run together."""
    require_contexts(tuple(contexts))
    rows = [(number, context) for number in range(len(requests)) for context in contexts]
    texts = [context + requests[number].filled for number, context in rows]
    order = sorted(range(len(rows)), key=lambda row: len(texts[row]))
    found: dict[int, tuple[Tensor, int, bool]] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = handle.encode([texts[row] for row in chunk])
        spans = [subject_span(requests[rows[row][0]], rows[row][1]) for row in chunk]
        positions = last_token_of(batch["offsets"], batch["attention_mask"], spans)
        keys = _run(handle, batch, layer)[torch.arange(len(chunk)), positions]
        starts = [bool(batch["offsets"][at, 0, 1] > span[0]) for at, span in enumerate(spans)]
        found.update(zip(chunk, zip(keys, positions, starts, strict=True), strict=True))
    size = len(contexts)
    return tuple(_key([found[number * size + i] for i in range(size)]) for number in range(len(requests)))


def _key(rows: Sequence[tuple[Tensor, int, bool]]) -> Key:
    per_context = torch.stack([key for key, _, _ in rows])
    return Key(
        k_star=per_context.double().mean(0),
        per_context=per_context,
        position=rows[0][1],
        subject_starts_text=rows[0][2],
    )


def by_length(texts: Sequence[str]) -> list[int]:
    """Indices of the texts, short ones first: rows of a batch are padded to its longest."""
    return sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))


def keys_at_subject(
    handle: ModelHandle, prompts: Sequence[str], subjects: Sequence[str], layer: int, batch_size: int = 32
) -> Float[Tensor, "n d_in"]:
    """Keys at the last token of each subject inside its filled prompt (last occurrence, if there are several).

    Raises BadRequestError where a subject does not occur in its prompt, and for no prompts at all.
    """
    return keys_at_subjects(handle, prompts, subjects, (layer,), batch_size)[layer]


def keys_at_subjects(
    handle: ModelHandle,
    prompts: Sequence[str],
    subjects: Sequence[str],
    layers: Sequence[int],
    batch_size: int = 32,
) -> dict[int, Float[Tensor, "n d_in"]]:
    """As `keys_at_subject` at several layers, which the same forward passes give."""
    _require_some(prompts)
    spans = [_find(prompt, subject) for prompt, subject in zip(prompts, subjects, strict=True)]
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(prompts), batch_size):
        batch = handle.encode(prompts[start : start + batch_size])
        positions = last_token_of(
            batch["offsets"], batch["attention_mask"], spans[start : start + batch_size]
        )
        for layer, keys in _run_layers(handle, batch, layers).items():
            rows[layer].append(keys[torch.arange(len(positions)), positions])
    return {layer: torch.cat(found) for layer, found in rows.items()}


def keys_at_last(
    handle: ModelHandle, prompts: Sequence[str], layer: int, batch_size: int = 32
) -> Float[Tensor, "n d_in"]:
    """Keys at the last token of each prompt; raises BadRequestError for none."""
    _require_some(prompts)
    rows = []
    for start in range(0, len(prompts), batch_size):
        batch = handle.encode(prompts[start : start + batch_size])
        last = batch["attention_mask"].sum(1) - 1
        rows.append(_run(handle, batch, layer)[torch.arange(len(last)), last])
    return torch.cat(rows)


def keys_everywhere(
    handle: ModelHandle, prompts: Sequence[str], layer: int
) -> list[Float[Tensor, "seq d_in"]]:
    """Keys at every token of each prompt."""
    return keys_everywhere_in(handle, prompts, (layer,))[layer]


def keys_everywhere_in(
    handle: ModelHandle, prompts: Sequence[str], layers: Sequence[int]
) -> dict[int, list[Float[Tensor, "seq d_in"]]]:
    """As `keys_everywhere` at several layers, which the same forward pass gives."""
    batch = handle.encode(prompts)
    lengths = batch["attention_mask"].sum(1).tolist()
    found = _run_layers(handle, batch, layers)
    return {layer: [row[:n] for row, n in zip(keys, lengths, strict=True)] for layer, keys in found.items()}


def _run(handle: ModelHandle, batch: dict[str, Tensor], layer: int) -> Float[Tensor, "batch seq d_in"]:
    return _run_layers(handle, batch, (layer,))[layer]


def _run_layers(
    handle: ModelHandle, batch: dict[str, Tensor], layers: Sequence[int]
) -> dict[int, Float[Tensor, "batch seq d_in"]]:
    names = {layer: key_hook(layer) for layer in layers}
    # Preserved, as a model left in train mode would drop out parts of the key.
    with torch.no_grad(), preserved(handle), record(handle, list(names.values()), stop=True) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    return {layer: seen[name] for layer, name in names.items()}


def _require_some(prompts: Sequence[str]) -> None:
    if not prompts:
        raise BadRequestError("no prompts to take keys from")


def _find(prompt: str, subject: str) -> tuple[int, int]:
    start = prompt.rfind(subject)
    if start < 0:
        raise BadRequestError(f"subject {subject!r} does not occur in prompt {prompt!r}")
    return start, start + len(subject)
