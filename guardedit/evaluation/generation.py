"""Text that the model writes by itself: greedy, or sampled from its likeliest tokens with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from guardedit.models import tokens
from guardedit.models.handle import ModelHandle, preserved

ANSWER_TOKENS = 16
"""Tokens that a free answer may take."""
TEXT_TOKENS = 100
"""Tokens of a text that fluency is read from, prompt included (Meng et al. 2022)."""
TOP_K = 5
"""Likeliest tokens that such a text is sampled from (Meng et al. 2022)."""
_BATCH = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken."""

    top_k: int = 1
    """1 is greedy decoding."""
    seed: int = 0


def continuations(handle: ModelHandle, prompts: Sequence[str], n_tokens: int) -> list[str]:
    """Up to `n_tokens` greedy tokens after each prompt, without the prompt; the model is left as it was."""
    return _written(handle, prompts, [n_tokens] * len(prompts), Sampling())


def texts(handle: ModelHandle, prompts: Sequence[str], seed: int, length: int = TEXT_TOKENS) -> list[str]:
    """Each prompt with a seeded continuation, `length` tokens together; the same seed gives the same texts."""
    room = [max(1, length - len(tokens.tokenise(handle, prompt).ids)) for prompt in prompts]
    written = _written(handle, prompts, room, Sampling(TOP_K, seed))
    return [prompt + text for prompt, text in zip(prompts, written, strict=True)]


@torch.no_grad()
def _written(
    handle: ModelHandle, prompts: Sequence[str], room: Sequence[int], sampling: Sampling
) -> list[str]:
    """Continuations in the order of the prompts, run in batches of similar length."""
    lengths = [len(tokens.tokenise(handle, prompt).ids) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (lengths[index], index))
    found: dict[int, str] = {}
    with preserved(handle):
        for start in range(0, len(order), _BATCH):
            chunk = order[start : start + _BATCH]
            batch = handle.encode([prompts[index] for index in chunk], side="left")
            steps = min(max(room[i] for i in chunk), handle.context_length - batch["input_ids"].shape[1])
            new = _continue(handle, batch["input_ids"], batch["attention_mask"], steps, sampling)
            for row, index in enumerate(chunk):
                found[index] = _text(handle, new[row, : room[index]])
    return [found[index] for index in range(len(prompts))]


def _continue(
    handle: ModelHandle, ids: Int[Tensor, "batch seq"], mask: Tensor, steps: int, sampling: Sampling
) -> Int[Tensor, "batch new"]:
    """New tokens, with a key-value cache; the end-of-text token repeated once a row has ended."""
    generator = torch.Generator(device=ids.device).manual_seed(sampling.seed)
    cache, new, out = None, ids, torch.empty(len(ids), 0, dtype=torch.long, device=ids.device)
    for _ in range(steps):
        step = handle.model(
            input_ids=new,
            attention_mask=mask,
            position_ids=tokens.position_ids(mask)[:, -new.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, new = step.past_key_values, _next(step.logits[:, -1].float(), sampling.top_k, generator)
        new = _held(handle, new, out)
        out = torch.cat([out, new], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if _ended(handle, out).all():
            break
    return out


def _next(logits: Tensor, top_k: int, generator: torch.Generator) -> Int[Tensor, "batch 1"]:
    """The likeliest token, or one of the `top_k` likeliest by their probabilities."""
    if top_k == 1 or not bool(torch.isfinite(logits).all()):
        # A broken model has no probabilities to draw from; what it says is then of no matter.
        return logits.nan_to_num().argmax(-1, keepdim=True)
    best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
    return best.indices.gather(-1, drawn)


def _held(handle: ModelHandle, new: Tensor, out: Tensor) -> Tensor:
    eos = handle.tokenizer.eos_token_id
    return new if eos is None else new.masked_fill(_ended(handle, out)[:, None], eos)


def _ended(handle: ModelHandle, out: Tensor) -> Tensor:
    """Rows that hold the end-of-text token."""
    eos = handle.tokenizer.eos_token_id
    return (out == (-1 if eos is None else eos)).any(1)


def _text(handle: ModelHandle, ids: Tensor) -> str:
    return str(handle.tokenizer.decode(ids, skip_special_tokens=True))
