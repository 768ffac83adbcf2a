"""The next token after each prompt, before an edit and rehearsed: both sides in one go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record, resume
from guardedit.models.installed import whole_from
from guardedit.records import Scope

BATCH = 16
"""Prompts a forward pass, sorted by length."""
REHEARSED = 8 * BATCH
"""Prompts a rehearsal: a delta of more than rewrite modules is written for each."""


@dataclass(frozen=True)
class Compared:
    """One prompt's next-token distribution, before and rehearsed."""

    scope: Scope
    prompt: str
    top_before: int
    top_after: int
    p_before: float
    """Of the old top token."""
    p_after: float
    """Of the same token."""
    kl_nats: float
    """KL(before ‖ rehearsed)."""


@torch.no_grad()
def compare(
    handle: ModelHandle, delta: EditDelta, prompts: Sequence[str], scopes: Sequence[Scope]
) -> list[Compared]:
    """Each prompt's last position before and under the rehearsed delta, in the order given. The weights are, or are
    again, what they were."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    found: dict[int, Compared] = {}
    for start in range(0, len(order), REHEARSED):
        chunk = order[start : start + REHEARSED]
        before, after = _both_sides(handle, delta, [prompts[i] for i in chunk])
        if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise FloatingPointError("a next-token distribution came out as NaN or infinite")
        for row, index in enumerate(chunk):
            found[index] = _compared(before[row], after[row], scopes[index], prompts[index])
    return [found[index] for index in range(len(prompts))]


def _both_sides(
    handle: ModelHandle, delta: EditDelta, prompts: Sequence[str]
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n vocab"]]:
    """Log-probabilities (nats, float64) at the last position, before and rehearsed."""
    batches = [handle.encode(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    start = whole_from(handle, delta.lowest_layer)
    name, before, entered = f"blocks.{start}.hook_resid_pre", [], []
    for batch in batches:
        with record(handle, [name]) as seen:
            before.append(_last_logprobs(handle, batch["input_ids"], batch["attention_mask"]))
        entered.append(seen[name])
    after = []
    with rehearsed(handle, delta):
        for batch, resid_pre in zip(batches, entered, strict=True):
            # At layer 0 an edit may have moved the embeddings, so nothing is taken over.
            with resume(handle, start, resid_pre) if start else nullcontext():
                after.append(_last_logprobs(handle, batch["input_ids"], batch["attention_mask"]))
    return torch.cat(before), torch.cat(after)


def _last_logprobs(
    handle: ModelHandle, ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch vocab"]:
    real = mask.bool()
    last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
    return handle.logits_at(handle.hidden(ids, mask), last).double().log_softmax(-1)


def _compared(
    before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"], scope: Scope, prompt: str
) -> Compared:
    top = int(before.argmax())
    return Compared(
        scope=scope,
        prompt=prompt,
        top_before=top,
        top_after=int(after.argmax()),
        p_before=float(before[top].exp()),
        p_after=float(after[top].exp()),
        # Rounding can take the KL of nearly equal distributions below its bound.
        kl_nats=max(0.0, float((before.exp() * (before - after)).sum())),
    )
